"""`tfamp lint`: what in a recipe's model will go wrong in 16 bits.

With `--json`: `schema` ("tfamp.lint/1"), `recipe`, `model`, `precision` (what
the layers compute in), `replicas`, `counts` (findings by severity), `findings`
(each `rule`, `severity`, `layer`, `message`, `fix`, `line`).
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Group

from tfamp.commands import json_flag, recipe_argument
from tfamp.errors import InputError
from tfamp.files import console

if TYPE_CHECKING:
    from tfamp.analysis.lint.findings import Finding
    from tfamp.recipe.subject import Subject

_SCHEMA = "tfamp.lint/1"


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "lint",
        help="what in a recipe's model will go wrong in 16 bits",
        description="Looks at a recipe's model, optimizer and first batch, and "
        "runs no step without --run. Exits with 1 if a finding is an error.",
        allow_abbrev=False,
    )
    recipe_argument.add_to(parser, takes_model=True)
    parser.add_argument(
        "--run",
        dest="runs_step",
        action="store_true",
        help="run one step beside itself in float32 too, see `tfamp compare`",
    )
    parser.add_argument(
        "--sarif",
        metavar="FILE",
        default="",
        help="write SARIF 2.1.0 too, which code hosts show beside the code",
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.recipe import quiet_tensorflow

    quiet_tensorflow()
    sarif_file = _checked_file(args.sarif)
    recipe, config = recipe_argument.load(args)
    if args.runs_step:
        recipe_argument.require_data(args, config)

    from tfamp.analysis.lint.check import lint
    from tfamp.analysis.lint.findings import ERROR
    from tfamp.recipe.subject import open_subject

    # What a recipe prints is not part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        subject = open_subject(recipe, config)
    batch = next(iter(subject.train_batches), None)
    findings = lint(subject.model, batch)
    if args.runs_step:
        from tfamp.analysis.shadow.compare import compare

        findings += compare(subject.model, batch).findings()
    if sarif_file is not None:
        source = args.recipe
        if not recipe_argument.is_saved_model(args):
            source = recipe.__file__ or source
        _write_sarif(sarif_file, findings, subject, source)
    if args.json:
        console.print_json(_report(args.recipe, subject, findings))
    else:
        console.print_text(*_text(findings))
    return int(any(each.severity == ERROR for each in findings))


def _checked_file(name: str) -> pathlib.Path | None:
    if not name:
        return None
    file = pathlib.Path(name).expanduser()
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(
            f"--sarif={name}: expected a file in a folder that exists."
        )
    return file


def _write_sarif(
    file: pathlib.Path,
    findings: "list[Finding]",
    subject: "Subject",
    source: str,
) -> None:
    from tfamp.analysis.lint.check import RULES
    from tfamp.analysis.lint.sarif import sarif_log
    from tfamp.analysis.shadow.report import MADE_ERROR
    from tfamp.files.output import write_atomically
    from tfamp.precision.layer_paths import walk

    types = {
        place.path: type(place.layer).__name__ for place in walk(subject.model)
    }
    log = sarif_log(findings, (*RULES, MADE_ERROR), pathlib.Path(source), types)
    try:
        write_atomically(file, json.dumps(log, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"--sarif={file}: {error.strerror or error}."
        ) from error


def _report(
    recipe: str, subject: "Subject", findings: "list[Finding]"
) -> dict[str, Any]:
    from tfamp.precision.policy import precision_of

    return {
        "schema": _SCHEMA,
        "recipe": recipe,
        "model": subject.model.name,
        "precision": precision_of(subject.model),
        "replicas": subject.model.distribute_strategy.num_replicas_in_sync,
        "counts": _counts(findings),
        "findings": [dataclasses.asdict(each) for each in findings],
    }


def _text(findings: "list[Finding]") -> list[Group | str]:
    """A block for each rule and fix, with the layers that it concerns."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for each in findings:
        key = (each.severity, each.rule, each.message, each.fix)
        where = each.layer or "the model"
        groups.setdefault(key, []).append(
            f"{where}  {each.line}" if each.line else where
        )
    blocks: list[Group | str] = []
    for (severity, rule, message, fix), layers in groups.items():
        rows = [("where", layer) for layer in layers[:1]]
        rows += [("", layer) for layer in layers[1:]]
        rows += [("what", message)]
        first, *rest = fix.splitlines()
        rows += [("fix", first), *(("", line) for line in rest)]
        blocks.append(console.section(f"{severity}  {rule}", rows))
    counts = [
        f"{count} {severity}{'s' if count > 1 and severity != 'info' else ''}"
        for severity, count in _counts(findings).items()
        if count
    ]
    return [*blocks, ", ".join(counts) or "nothing found"]


def _counts(findings: "list[Finding]") -> dict[str, int]:
    from tfamp.analysis.lint.findings import SEVERITIES

    return {
        severity: sum(each.severity == severity for each in findings)
        for severity in SEVERITIES
    }
