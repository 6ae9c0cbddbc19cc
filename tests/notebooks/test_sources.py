"""Notebooks use tfamp and the recipes, and reimplement nothing of them."""

import ast
import functools
import pathlib

import pytest

from colab import generate

ROOT = pathlib.Path(__file__).parent.parent.parent
MOST_FUNCTIONS = 4


def is_public(name):
    return not name.startswith("_")


def defined_names(tree):
    """Functions and classes of a file, wherever in it."""
    return [
        node.name
        for node in ast.walk(tree)
        if isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        )
    ]


@functools.cache
def names_of_tfamp_and_recipes():
    """Public functions and classes of their modules, and of no class."""
    names = set()
    for path in [*ROOT.glob("tfamp/**/*.py"), *ROOT.glob("recipes/**/*.py")]:
        module = ast.parse(path.read_text())
        names |= {
            node.name
            for node in module.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and is_public(node.name)
        }
    return names - {"main"}  # Says nothing of what it does.


def reimplemented(text):
    """What in a notebook's source tfamp has already, one line each."""
    tree = ast.parse(text)
    known = names_of_tfamp_and_recipes()
    found = [f"defines {n}" for n in defined_names(tree) if n in known]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            found += [
                f"class {node.name}({base})"
                for base in bases
                if "optimizer" in base.lower() or "callback" in base.lower()
            ]
        name = getattr(node, "attr", getattr(node, "id", ""))
        if name in ("GradientTape", "apply_gradients", "scale_loss"):
            found.append(f"uses {name}")
    return found


@pytest.fixture(params=generate.sources(), ids=lambda path: path.stem)
def source(request):
    return request.param.read_text()


def test_a_notebook_defines_nothing_that_tfamp_has(source):
    assert reimplemented(source) == []


def test_a_notebook_defines_little(source):
    assert len(defined_names(ast.parse(source))) <= MOST_FUNCTIONS


def test_a_notebook_uses_tfamp(source):
    imported = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert "tfamp" in imported


def test_a_notebook_touches_nothing_private(source):
    private = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and not is_public(node.attr)
        and not node.attr.startswith("__")
    ]
    assert private == []


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("def wrap_optimizer(o): return o", "defines wrap_optimizer"),
        ("class LossScaleOptimizer: pass", "defines LossScaleOptimizer"),
        ("class A(keras.callbacks.Callback): pass", "class A(keras."),
        ("class A(keras.optimizers.SGD): pass", "class A(keras.optimizers"),
        ("with tf.GradientTape() as t: pass", "uses GradientTape"),
        ("def resnet_small(x): return x", "defines resnet_small"),
    ],
)
def test_what_is_reimplemented_is_found(text, finding):
    (found,) = reimplemented(text)
    assert found.startswith(finding)
