"""`tfamp new` writes a recipe that runs, and never over another file."""

import os
import runpy
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tfamp import cli
from tfamp.recipe import configure, load_recipe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_new_recipe_learns_at_once(folder, capsys):
    assert cli.main(["new", "my_model"]) == 0
    assert "python my_model.py" in capsys.readouterr().out
    text = (folder / "my_model.py").read_text()
    assert "NAME" not in text
    recipe = load_recipe("my_model.py")
    settings = {"strategy": "one_device", "precision": "mixed_bfloat16"}
    metrics = recipe.train(configure(recipe.Config, settings))
    assert metrics["accuracy"] > 0.7
    assert metrics["skipped_steps"] == 0


@pytest.mark.slow
def test_it_starts_without_a_word_of_tensorflow(folder):
    cli.main(["new", "my_model"])
    done = subprocess.run(
        [sys.executable, "my_model.py", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_its_flags_are_those_of_every_recipe(folder, capsys, monkeypatch):
    cli.main(["new", "my_model.py"])
    monkeypatch.setattr("sys.argv", ["my_model.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path("my_model.py", run_name="__main__")
    assert exit_.value.code == 0
    assert "--checkpoint_dir" in capsys.readouterr().out


def test_a_file_that_is_there_stays(folder, capsys):
    (folder / "mine.py").write_text("precious")
    assert cli.main(["new", "mine"]) == 2
    assert "mine.py is there already" in capsys.readouterr().err
    assert (folder / "mine.py").read_text() == "precious"


@pytest.mark.parametrize("name", ["my-model", "class", "a.b", "1st", "x/"])
def test_a_name_that_python_cannot_import_is_refused(folder, capsys, name):
    assert cli.main(["new", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(folder.iterdir())


def test_a_folder_that_is_not_there_is_named(folder, capsys):
    assert cli.main(["new", "no/mine"]) == 2
    assert "no/mine.py cannot be written" in capsys.readouterr().err
