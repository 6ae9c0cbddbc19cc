"""Imports are light and run one way; public names are there and documented."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import tfamp

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted((ROOT / "tfamp").rglob("*.py"))
LEAVES = ("errors", "formats", "hardware", "version")


def imported_modules(path):
    """What a file imports, wherever in it, `if TYPE_CHECKING` apart."""
    tree = ast.parse(path.read_text())
    type_checking = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in type_checking:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_import_loads_neither_keras_nor_tensorflow():
    script = (
        "import sys, tfamp; "
        "print([m for m in ('keras', 'tensorflow', 'numpy') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_library_imports_no_recipe_and_no_analysis_from_below(path):
    imported = list(imported_modules(path))
    assert not [name for name in imported if name.startswith("recipes")]
    if not {"analysis", "commands"} & set(path.parts):
        assert not [name for name in imported if "analysis" in name]


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_no_other_room(name):
    imported = imported_modules(ROOT / "tfamp" / f"{name}.py")
    rooms = {m for m in imported if m.startswith("tfamp")}
    assert rooms <= {"tfamp.errors.InputError", "tfamp.version.__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_private_names_of_keras_are_touched_in_one_place(path):
    if path.stem == "keras_internals":
        return
    assert not [
        name for name in imported_modules(path) if name.startswith("keras.src")
    ]


@pytest.mark.parametrize("name", tfamp.__all__)
def test_public_names_resolve_and_are_documented(name):
    value = getattr(tfamp, name)
    if name not in ("FORMATS", "__version__"):
        assert inspect.getdoc(value)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not signature.empty
        for parameter in signature.parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:
                assert parameter.annotation is not parameter.empty, parameter


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        tfamp.fitt  # noqa: B018


def test_every_module_has_its_place_on_the_map():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    absent = [
        path.stem
        for path in MODULES
        if path.stem not in ("__init__", "errors", "version")
        and f"`{path.stem}`" not in text
    ]
    assert not absent
