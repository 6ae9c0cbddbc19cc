"""The pages are true: their code runs, their consoles print what they show."""

import importlib
import re
import shlex

import pytest

import tfamp
from tests.conftest import ROOT, mostly_long
from tfamp import cli

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
            "docs/tutorials/your_model.md",
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
