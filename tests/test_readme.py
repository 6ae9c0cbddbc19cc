"""The README is true: its code runs, and its two commands are two lines."""

import re
import shlex

import numpy as np
import pytest
from sklearn import datasets

from recipes import image_classification
from tests.conftest import ROOT
from tfamp import cli
from tfamp.recipe import configure, flags, load_recipe

BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$",
    (ROOT / "README.md").read_text(),
    flags=re.MULTILINE | re.DOTALL,
)


def blocks(language):
    return [text for found, text in BLOCKS if found == language]


def test_python_blocks_run_from_top_to_bottom(tmp_path):
    source = "\n".join(blocks("python")).replace("/tmp", str(tmp_path))
    names = {}

    exec(compile(source, "README.md", "exec"), names)

    assert names["results"]["accuracy"] > 0.5
    assert names["history"].history["skipped_steps"] == [0] * 5


def test_the_functions_of_the_walk_through_make_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "my_model"]) == 0
    path = tmp_path / "my_model.py"
    text = path.read_text()
    for function in blocks("py"):
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


def test_the_two_commands_of_a_newcomer_are_one_line_each():
    run, test = blocks("bash")[:2]
    assert run.count("\n") == test.count("\n") == 1
    assert "-m pytest -q" in test
    *_, module, flag = shlex.split(run)
    assert module == image_classification.__name__
    _, parsed = flags.parse_flags(image_classification.Config, [flag])
    assert parsed.precision == "mixed_bfloat16"


@pytest.mark.parametrize("block", blocks("console"))
def test_console_blocks_show_what_the_commands_print(block, capsys):
    prompt, _, expected = block.partition("\n")
    program, *arguments = shlex.split(prompt.removeprefix("$ "))
    assert program == "tfamp"

    # 1 where lint finds what it is shown to find.
    assert cli.main(arguments) == (arguments[0] == "lint")

    assert capsys.readouterr().out == expected
