"""A command is written as a shell takes it."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tfamp.files import command_line


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["/usr/bin/tfamp", "bench", "a b.py"], "tfamp bench 'a b.py'"),
        (["C:\\bin\\tfamp", "lint"], "tfamp lint"),
        (["my/recipe.py", "--epochs=2"], "python recipe.py --epochs=2"),
    ],
)
def test_the_folder_of_the_program_says_nothing(argv, text):
    assert command_line.written(argv) == text


def test_a_module_is_written_as_it_was_started():
    code = (
        "import sys, types, tfamp.files.command_line as c;"
        "sys.modules['__main__'].__spec__ ="
        " types.SimpleNamespace(name='recipes.digits');"
        "sys.argv = ['/x/digits.py', '--epochs=2']; print(c.written())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "python -m recipes.digits --epochs=2\n"
