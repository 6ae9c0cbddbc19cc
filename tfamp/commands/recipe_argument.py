"""The recipe that a command works on, and the fields that are set for it.

`tfamp COMMAND recipes.image_classification --config.batch_size=128`
"""

import argparse
import types
from collections.abc import Sequence
from typing import Any

from tfamp.config import configure
from tfamp.errors import InputError
from tfamp.recipe import load_recipe

_PREFIX = "--config."


def split_settings(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Takes the `--config.FIELD=VALUE` out of a command line.

    Returns:
        Field and text of each, and the other arguments.

    Raises:
        InputError: one has no `=VALUE`.
    """
    settings, others = {}, []
    for argument in argv:
        if not argument.startswith(_PREFIX):
            others.append(argument)
            continue
        name, equals, text = argument.removeprefix(_PREFIX).partition("=")
        if not (name and equals):
            raise InputError(
                f"{argument!r} sets nothing; expected --config.FIELD=VALUE."
            )
        settings[name] = text
    return settings, others


def attach_settings(args: argparse.Namespace, settings: dict[str, str]) -> None:
    """Hands the settings to a command that takes a recipe.

    Raises:
        InputError: the command takes none.
    """
    if settings and not hasattr(args, "recipe"):
        raise InputError(
            f"{_PREFIX}{next(iter(settings))} belongs to a command that takes "
            "a recipe, as `tfamp lint` does."
        )
    args.settings = settings


def add_to(parser: argparse.ArgumentParser) -> None:
    """Declares the recipe of a command."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a module, recipes.image_classification, or a file, my/recipe.py;"
        " --config.FIELD=VALUE sets its flags",
    )


def load(
    args: argparse.Namespace, *reserved: str
) -> tuple[types.ModuleType, Any]:
    """The recipe's module and its config.

    Args:
        args: of a command that called `add_to`.
        *reserved: fields that the command itself sets.

    Raises:
        InputError: there is no such recipe or field, the value does not fit,
            or the field is reserved.
    """
    recipe = load_recipe(args.recipe)
    for name in reserved:
        if name in args.settings:
            raise InputError(
                f"{_PREFIX}{name} is set by the command itself; leave it out."
            )
    return recipe, configure(recipe.Config, args.settings)
