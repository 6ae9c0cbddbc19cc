"""The pages are true: their code runs, their consoles print what they show."""

import importlib
import re
import shlex

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn import datasets

import tfamp
from tests.conftest import ROOT, mostly_long
from tfamp import cli
from tfamp.commands import recipe_argument
from tfamp.distribute import launch
from tfamp.recipe import (
    RunConfig,
    configure,
    flags,
    load_recipe,
    saved_model,
)

PAGES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")
)
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The page's blocks of code in a language, without their indentation."""
    return [
        re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
        for indent, found, text in BLOCK.findall((ROOT / page).read_text())
        if found == language
    ]


WITH_CODE = [page for page in PAGES if blocks(page, "python")]
CONSOLES = [
    (page, block) for page in PAGES for block in blocks(page, "console")
]


@pytest.mark.parametrize(
    "page",
    mostly_long(
        WITH_CODE,
        always=[
            "docs/index.md",
            "docs/concepts/loss_scaling.md",
        ],
    ),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "\n".join(blocks(page, "python"))

    exec(compile(source, page, "exec"), {"__name__": page})


@pytest.mark.parametrize(("page", "block"), CONSOLES)
def test_consoles_show_what_the_commands_print(page, block, capsys):
    prompt, _, expected = block.partition("\n")
    program, *arguments = shlex.split(prompt.removeprefix("$ "))
    assert program == "tfamp"

    # 1 where lint finds what it is shown to find.
    assert cli.main(arguments) == (arguments[0] == "lint")

    assert capsys.readouterr().out == expected


def commands(text):
    """The words of each command of a block for shells."""
    for line in text.replace("\\\n", " ").splitlines():
        yield shlex.split(line, comments=True)


COMMANDS = [
    words
    for page in PAGES
    for block in blocks(page, "sh")
    for words in commands(block)
    if words and words[0] in ("tfamp", "python")
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_flags_of_commands_are_those_that_there_are(words):
    program, *rest = words
    if program == "tfamp":
        settings, rest = flags.split_settings(rest)
        args, others = cli._parser().parse_known_args(rest)
        recipe_argument.attach_settings(args, settings, others)
        name, settings = getattr(args, "recipe", ""), args.settings
        if name.startswith("recipes."):
            configure(load_recipe(name).Config, settings)
        elif name.endswith(".keras"):
            assert args.takes_model
            configure(saved_model.Config, settings)
        else:
            assert settings == {}
    elif rest[:2] == ["-m", "tfamp.launch"]:
        assert launch._parse(rest[2:])
    elif rest[0].endswith(".py"):
        flags.parse_flags(RunConfig, rest[1:])
    elif "recipes" in rest[1]:
        flags.parse_flags(load_recipe(rest[1]).Config, rest[2:])
    else:
        assert rest[1] in ("colab.generate", "benchmarks.audits", "venv"), rest


def test_what_is_for_tpus_runs_on_a_cpu():
    (source,) = blocks("docs/tutorials/tpu.md", "py")
    assert source.count('"tpu"') == 1

    def build():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    batches = tf.data.Dataset.from_tensors((np.ones((4, 2)), np.ones((4, 1))))
    names = {"tfamp": tfamp, "build": build, "batches": batches}
    exec(source.replace('"tpu"', '"one_device"'), names)
    assert int(names["model"].optimizer.iterations) == 1


@pytest.mark.slow
def test_the_functions_of_the_walk_through_make_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "my_model"]) == 0
    path = tmp_path / "my_model.py"
    text = path.read_text()
    for function in blocks("docs/tutorials/your_recipe.md", "py"):
        name = re.match(r"def (\w+)", function)[1]
        text, count = re.subn(
            rf"^def {name}\(.*?(?=^def )",
            lambda _, function=function: f"{function}\n\n",
            text,
            flags=re.MULTILINE | re.DOTALL,
        )
        assert count == 1
    path.write_text(text)
    digits = datasets.load_digits()
    images = digits.images[..., None] / 16
    np.savez("my_data.npz", images=images, labels=digits.target)
    recipe = load_recipe("my_model.py")
    settings = {"strategy": "one_device", "precision": "mixed_bfloat16"}
    metrics = recipe.train(configure(recipe.Config, settings))
    assert metrics["accuracy"] > 0.5
    assert cli.main(["lint", "my_model.py"]) == 0


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs/reference/api.md").read_text()
    page += (ROOT / "docs/reference/errors.md").read_text()
    public = set(tfamp.__all__) - {
        *("__version__", "FORMATS", "callbacks", "recipe"),
    }
    assert [name for name in sorted(public) if name not in page] == []
    for path in re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        if path != "tfamp.errors":
            assert hasattr(importlib.import_module(module), name), path


def test_the_reference_has_every_command():
    page = (ROOT / "docs/reference/commands.md").read_text()
    for name in cli.COMMANDS:
        assert f"`tfamp {name}" in page, name


def test_each_page_is_in_the_table_of_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert page.removeprefix("docs/") in contents
