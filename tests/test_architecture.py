"""Imports are light and run one way; public names are there and documented."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import tfamp
from tests.conftest import ROOT

MODULES = sorted((ROOT / "tfamp").rglob("*.py"))
# From the ground up: a package imports only what is listed before it.
ORDER = (
    "version",
    "errors",
    "formats",
    "tensorflow_internals",
    "keras_internals",
    "files",
    "hardware",
    "distribute",
    "scaling",
    "precision",
    "taps",
    "accumulation",
    "layers",
    "checkpoint",
    "step",
    "overflow",
    "training",
    "saving",
    "recipe",
    "analysis.page",
    "analysis.jobs",
    "analysis.lint",
    "analysis.shadow",
    "analysis.probe",
    "analysis.parity",
    "analysis.bench",
    "analysis.tune",
    "analysis.memory",
    "analysis.exported",
    "analysis.portability",
    "analysis.report",
    "commands",
    "cli",
)
# What only hands on names that live deeper in the house.
DOORS = ("tfamp", "tfamp.__main__", "tfamp.callbacks", "tfamp.launch")


def imported_modules(path):
    """What a file imports, wherever in it, also for a type checker only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def attributes(path):
    """All that a file reads of something by a dot."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node


def strings(path):
    """All constants of a file that are texts."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


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


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in MODULES}


def package_of(module):
    """The entry of ORDER a module belongs to."""
    rest = module.removeprefix("tfamp.")
    found = [
        each for each in ORDER if rest == each or rest.startswith(f"{each}.")
    ]
    assert len(found) == 1, f"{module} has no place in ORDER"
    return found[0]


def imports_of(module):
    """The modules of tfamp that a module imports, of any depth."""
    found = set()
    for name in imported_modules(NAMES[module]):
        while name and name not in NAMES:
            name = name.rpartition(".")[0]
        if name.startswith("tfamp.") and name != module:
            found.add(name)
    return found


INSIDE = sorted(
    name for name in NAMES if name not in DOORS and name != "tfamp.analysis"
)


def test_a_package_imports_only_what_is_below_it():
    floor = {package: i for i, package in enumerate(ORDER)}
    upward = [
        (module, name)
        for module in INSIDE
        for name in imports_of(module)
        if floor[package_of(name)] > floor[package_of(module)]
    ]
    assert not upward


def test_no_two_modules_need_each_other():
    graph = {module: imports_of(module) for module in INSIDE}
    graph = {module: names & graph.keys() for module, names in graph.items()}
    # What imports nothing that is left cannot be on a cycle.
    while free := {module for module, names in graph.items() if not names}:
        graph = {
            module: names - free
            for module, names in graph.items()
            if module not in free
        }
    assert not graph


def test_a_module_does_not_repeat_the_name_of_its_folder():
    repeating = [
        path
        for path in MODULES
        if path.parent.name != "tfamp"
        and path.parent.name.rstrip("s") in path.stem
    ]
    assert not repeating


def test_the_library_imports_no_recipe():
    assert not [
        path
        for path in MODULES
        if any(name.startswith("recipes") for name in imported_modules(path))
    ]


def test_tests_lie_beside_what_they_test():
    folders = {
        path.parent.relative_to(ROOT / "tests")
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    # The notebooks' sources are in colab, Keras's tests where Keras is.
    folders -= {pathlib.Path("notebooks"), pathlib.Path("keras_suite")}
    astray = [
        folder
        for folder in folders
        if not any((root / folder).is_dir() for root in (ROOT / "tfamp", ROOT))
    ]
    assert not astray


@pytest.mark.parametrize(
    ("private", "home"),
    [
        (("keras.src",), "keras_internals"),
        (("tensorflow.python", "tf.python"), "tensorflow_internals"),
    ],
    ids=["Keras", "TensorFlow"],
)
def test_private_names_are_touched_in_one_place(private, home):
    touching = {
        name
        for name, path in NAMES.items()
        if any(
            read.startswith(private)
            for read in (
                *imported_modules(path),
                *map(ast.unparse, attributes(path)),
                # As keys of `sys.modules`, and for `importlib`.
                *strings(path),
            )
        )
    }
    assert {package_of(name) for name in touching} == {home}


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
