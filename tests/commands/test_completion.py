"""What a shell offers while a command is typed."""

import json
import shutil
import subprocess

import pytest

from tfamp import cli
from tfamp.recipe import shipped_recipes


@pytest.fixture
def script(capsys):
    def make(shell):
        assert cli.main(["completion", shell]) == 0
        return capsys.readouterr().out

    return make


def offered(script, *words):
    """What bash offers for the last of these words."""
    typed = " ".join(f"'{word}'" for word in ("tfamp", *words))
    program = f"""{script}
COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _tfamp
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["p"], ["probe", "parity", "portability"]),
        (["do"], ["doctor"]),
        (["bench", "--r"], ["--rounds="]),
        (["bench", "recipes.im"], ["recipes.image_classification"]),
        (["bench", "recipes.image_classification", "--micro"], ["--microba"]),
        (["doctor", "--microbatches"], []),
        (["completion", "z"], ["zsh"]),
        (["report", "--js"], ["--json"]),
    ],
)
def test_bash_offers_commands_flags_and_recipes(script, words, expected):
    found = offered(script("bash"), *words)
    assert len(found) == len(expected)
    assert all(map(str.startswith, found, expected))


def test_the_other_shells_have_the_same_words(script, capsys):
    assert "bashcompinit" in script("zsh")
    assert script("zsh").endswith(script("bash"))
    fish = script("fish")
    assert cli.main(["completion", "fish", "--json"]) == 0
    words = json.loads(capsys.readouterr().out)["words"]
    assert set(words) == set(cli.COMMANDS)
    for name, found in words.items():
        assert f"-f -a {name} -d " in fish
        assert fish.count(f"subcommand_from {name}'") == len(found)


def test_shipped_recipes_are_programs_and_not_what_they_share():
    found = shipped_recipes()
    assert "recipes.language_model" in found
    assert "recipes.transformer" not in found


def test_every_command_prints_json_where_it_is_asked():
    parser = cli._parser()
    (commands,) = parser._subparsers._group_actions
    for name, command in commands.choices.items():
        assert "--json" in command.format_help(), name
