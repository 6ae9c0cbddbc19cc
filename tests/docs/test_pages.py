"""The pages are true: their code runs, their consoles print what they show."""

import importlib
import re
import shlex

import numpy as np
import pytest
from sklearn import datasets

import tfamp
from tests.conftest import ROOT, mostly_long
from tfamp import cli
from tfamp.recipe import configure, load_recipe

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
    for command in cli.COMMANDS:
        name = command.__name__.rpartition(".")[2]
        assert f"`tfamp {name}" in page, name


def test_each_page_is_in_the_table_of_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert page.removeprefix("docs/") in contents
