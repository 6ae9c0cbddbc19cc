"""A benchmark as a program: flags in, an exit status out."""

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tfamp.errors import InputError
from tfamp.recipe import describe_exit, quiet_tensorflow
from tfamp.recipe.flags import parse_flags


def run(
    config_class: type,
    measure: Callable[[Any], Any],
    description: str,
    argv: Sequence[str],
) -> int:
    """Parses the flags, and measures.

    `tfamp.recipe.main` prints what it returns, as final metrics; here it has
    been printed.

    Args:
        config_class: a dataclass whose fields are the flags.
        measure: takes an instance of it.
        description: what `--help` says before the flags.
        argv: the arguments after the program's name.

    Returns:
        0; 2 for bad input and 1 for a failed process, both with one line on
        stderr.
    """
    # Before anything imports it.
    quiet_tensorflow()
    try:
        help_text, config = parse_flags(config_class, argv)
        if config is None:
            print(f"{description.strip()}\n\n{help_text}")
            return 0
        measure(config)
    except (Exception, KeyboardInterrupt) as error:
        described = describe_exit(error)
        if described is None:
            raise
        print(f"tfamp: {described[0]}", file=sys.stderr)
        return described[1]
    return 0


def check_known(given: Collection[str], known: Collection[str]) -> None:
    """Checks the value of a flag that names some of several things.

    Raises:
        InputError: one is none of them.
    """
    for each in given:
        if each not in known:
            raise InputError(
                f"Unknown {each!r}; expected some of {', '.join(known)}."
            )
