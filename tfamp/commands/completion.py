"""`tfamp completion`: what a shell needs to complete commands and flags.

It is read off the parsers themselves, so that no flag has to be listed twice.
"""

import argparse
import dataclasses
import functools
import shlex
from collections.abc import Mapping
from typing import Any

from tfamp.commands import json_flag
from tfamp.files import console
from tfamp.recipe import RunConfig, shipped_recipes

_SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_tfamp() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} words=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words={commands}
  else
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$current") )
  case ${{COMPREPLY[0]}} in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o default -F _tfamp tfamp
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "completion",
        help="a script by which your shell completes commands and flags",
        description='Prints a script. bash: put `eval "$(tfamp completion '
        'bash)"` into ~/.bashrc; zsh: the same into ~/.zshrc; fish: `tfamp '
        "completion fish > ~/.config/fish/completions/tfamp.fish`.",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=_SHELLS)
    json_flag.add_to(parser)
    parser.set_defaults(run=functools.partial(_run, commands))


def _run(commands: Any, args: argparse.Namespace) -> int:
    words = {name: _words(parser) for name, parser in commands.choices.items()}
    if args.shell == "fish":
        script = _fish(commands.choices, words)
    else:
        script = _bash(words)
        script = _ZSH + script if args.shell == "zsh" else script
    if args.json:
        console.print_json(
            {"schema": "tfamp.completion/1", "words": words, "script": script}
        )
    else:
        print(script, end="")
    return 0


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """A command's flags, and where it takes a recipe, those and recipes."""
    words = []
    for action in parser._actions:
        takes_value = action.nargs != 0
        words += [
            f"{flag}=" if takes_value else flag
            for flag in action.option_strings
            if flag.startswith("--")
        ]
        if not action.option_strings:
            words += map(str, action.choices or ())
        if action.dest == "recipe":
            words += shipped_recipes()
            fields = dataclasses.fields(RunConfig)
            words += [f"--{field.name}=" for field in fields]
    return list(dict.fromkeys(words))


def _bash(words: Mapping[str, list[str]]) -> str:
    cases = "\n".join(
        f"      {name}) words={shlex.quote(' '.join(found))} ;;"
        for name, found in words.items()
    )
    return _BASH.format(commands=shlex.quote(" ".join(words)), cases=cases)


def _fish(
    parsers: Mapping[str, argparse.ArgumentParser],
    words: Mapping[str, list[str]],
) -> str:
    lines = []
    for name, found in words.items():
        summary = (parsers[name].description or "").partition(". ")[0]
        lines.append(
            "complete -c tfamp -n __fish_use_subcommand -f "
            f"-a {name} -d {shlex.quote(summary)}"
        )
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        for word in found:
            flag = word.removeprefix("--").removesuffix("=")
            value = " -r" if word.endswith("=") else ""
            kind = f"-l {flag}{value}" if word[:2] == "--" else f"-a {word}"
            lines.append(f"complete -c tfamp {seen} {kind}")
    return "\n".join(lines) + "\n"
