"""Findings as SARIF 2.1.0, which code hosts show beside the code.

The standard: OASIS, "Static Analysis Results Interchange Format (SARIF)
Version 2.1.0", 2020.
"""

import ast
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tfamp.analysis.lint.findings import ERROR, INFO, WARNING, Finding, Rule
from tfamp.version import __version__

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {ERROR: "error", WARNING: "warning", INFO: "note"}


def sarif_log(
    findings: Sequence[Finding],
    rules: Sequence[Rule],
    source: pathlib.Path,
    layer_types: Mapping[str, str],
) -> dict[str, Any]:
    """The log of one look at a recipe.

    Args:
        findings: of the recipe's model.
        rules: all that were applied.
        source: the recipe's file. Its path is told relative to the working
            directory, where it lies in it, as code hosts want it.
        layer_types: the class name of each layer, by path.

    Returns:
        A JSON object. A finding is on the line that names its layer, else
        the only line that makes a layer of its type, else that of
        `model.compile` where it is about no layer, else that of
        `build_model`.
    """
    source = source.resolve()
    names = [rule.name for rule in rules]
    lines = _Lines(source.read_text(encoding="utf-8"))
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "tfamp lint",
                        "version": __version__,
                        "rules": [
                            {
                                "id": rule.name,
                                "shortDescription": {"text": rule.what},
                            }
                            for rule in rules
                        ],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": [
                    _result(
                        finding,
                        names.index(finding.rule),
                        _uri(source),
                        lines.of(
                            finding.layer, layer_types.get(finding.layer, "")
                        ),
                    )
                    for finding in findings
                ],
            }
        ],
    }


class _Lines:
    """Where in a recipe's source things are."""

    def __init__(self, text: str):
        self._calls = [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call)
        ]
        self._definitions = {
            node.name: node.lineno
            for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        }

    def of(self, path: str, layer_type: str) -> int:
        """The line, from 1 on, for a layer's path; "" for the model."""
        if not path:
            compiling = self._lines_calling("compile")
            return compiling[0] if compiling else self._build_model()
        # The innermost layer may be made by another, which the file names.
        for name in reversed(path.split("/")):
            named = [c.lineno for c in self._calls if _is_named(c, name)]
            if named:
                return named[0]
        made = self._lines_calling(layer_type)
        if len(made) == 1:
            return made[0]
        return self._definitions.get(layer_type, self._build_model())

    def _build_model(self) -> int:
        return self._definitions.get("build_model", 1)

    def _lines_calling(self, name: str) -> list[int]:
        found = [call for call in self._calls if _called(call) == name]
        return sorted(call.lineno for call in found)


def _called(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_named(call: ast.Call, name: str) -> bool:
    return any(
        keyword.arg == "name"
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value == name
        for keyword in call.keywords
    )


def _result(
    finding: Finding, rule_index: int, uri: str, line: int
) -> dict[str, Any]:
    where = f"{finding.layer}: " if finding.layer else ""
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": uri},
            "region": {"startLine": line},
        }
    }
    if finding.layer:
        location["logicalLocations"] = [
            {"fullyQualifiedName": finding.layer, "kind": "object"}
        ]
    return {
        "ruleId": finding.rule,
        "ruleIndex": rule_index,
        "level": _LEVELS[finding.severity],
        "message": {
            "text": f"{where}{finding.message}\n\nFix:\n\n{finding.fix}"
        },
        "locations": [location],
        # The line moves with every edit above it; these do not.
        "partialFingerprints": {
            "tfampLint/v1": f"{finding.rule}:{finding.layer}"
        },
    }


def _uri(source: pathlib.Path) -> str:
    here = pathlib.Path.cwd().resolve()
    if source.is_relative_to(here):
        return source.relative_to(here).as_posix()
    return source.as_uri()
