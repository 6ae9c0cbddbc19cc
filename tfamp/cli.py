"""The command line: `tfamp COMMAND`.

The commands are in `tfamp/commands`. Bad input, there or in the library, is an
`InputError`: one line on stderr and exit status 2.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from tfamp.commands import recipe_argument
from tfamp.errors import InputError, did_you_mean
from tfamp.files.standard_error import start_tensorflow_quietly
from tfamp.recipe import report_exit
from tfamp.recipe.flags import split_settings
from tfamp.version import __version__

# Modules of `tfamp/commands`, in the order of a person's work.
COMMANDS = (
    "doctor",
    "new",
    "lint",
    "compare",
    "probe",
    "tune",
    "memory",
    "bench",
    "parity",
    "export",
    "portability",
    "report",
    "formats",
    "completion",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit status: 0; 1 where a command found something wrong; 2 for bad
        input.
    """
    argv = sys.argv[1:] if argv is None else argv
    start_tensorflow_quietly()
    try:
        settings, argv = split_settings(argv)
        if not argv:
            _parser().print_help()
            return 0
        args, others = _parser(_asked_for(argv[0])).parse_known_args(
            [_shield_negative(a) for a in argv]
        )
        recipe_argument.attach_settings(args, settings, others)
        return args.run(args)
    except BrokenPipeError:
        # The reader, such as `head`, has gone. Python flushes stdout once
        # more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        return report_exit(error)


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line instead of a usage page."""

    def error(self, message: str):
        raise InputError(f"{message}; see `{self.prog} --help`.")


def _parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tfamp",
        description="Mixed-precision training for Keras 3 on TensorFlow.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in names:
        importlib.import_module(f"tfamp.commands.{name}").add_to(commands)
    return parser


def _asked_for(word: str) -> Sequence[str]:
    """The commands to import for a first word: that one, where it will do."""
    if word.startswith("-") or word == "completion":  # It describes them all.
        return COMMANDS
    if word not in COMMANDS:
        raise InputError(
            f"Unknown command {word!r}; expected one of {', '.join(COMMANDS)}."
            f"{did_you_mean(word, COMMANDS)}"
        )
    return (word,)


def _shield_negative(argument: str) -> str:
    # argparse takes -1e-8 and -inf for options. A leading blank makes them
    # positional, and does not change the number.
    if argument.startswith("-"):
        with contextlib.suppress(ValueError):
            float(argument)
            return f" {argument}"
    return argument
