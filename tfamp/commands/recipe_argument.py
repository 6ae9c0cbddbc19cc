"""The recipe that a command works on, and the flags that are set for it.

`tfamp COMMAND recipes.image_classification --batch_size=128`, as when the
recipe itself is run. `--config.batch_size=128` says the same, also where the
command has a flag of that name itself.
"""

import argparse
import types
from collections.abc import Sequence
from typing import Any

from tfamp.errors import InputError
from tfamp.precision.policy import canonical
from tfamp.recipe import load_recipe
from tfamp.recipe.flags import SETTING_PREFIX, configure


def attach_settings(
    args: argparse.Namespace, settings: dict[str, str], others: Sequence[str]
) -> None:
    """Hands a command what is set for its recipe.

    Args:
        args: of the command.
        settings: fields and their text, written `--config.FIELD=VALUE`.
        others: the arguments that the command does not know.

    Raises:
        InputError: the command takes no recipe, or an argument is no flag.
    """
    settings = _flags(args, others) | settings
    if settings and not hasattr(args, "recipe"):
        raise InputError(
            f"{SETTING_PREFIX}{next(iter(settings))} belongs to a command "
            "that takes a recipe, as `tfamp lint` does."
        )
    args.settings = settings


def add_to(parser: argparse.ArgumentParser) -> None:
    """Declares the recipe of a command."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a module, recipes.image_classification, or a file, my/recipe.py;"
        " its flags are set as when it is run, --FLAG=VALUE",
    )


def add_precisions_to(parser: argparse.ArgumentParser) -> None:
    """Declares the precisions that a command compares."""
    parser.add_argument(
        "--precisions",
        type=_names,
        default="float32,mixed_bfloat16,mixed_float16",
        help="a comma list; float32 is what the others are compared with "
        "(default: %(default)s)",
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
                f"{SETTING_PREFIX}{name} is set by the command itself; leave "
                "it out."
            )
    flags = vars(args).keys() - {"recipe", "run", "settings"}
    return recipe, configure(recipe.Config, args.settings, others=flags)


def _flags(
    args: argparse.Namespace, arguments: Sequence[str]
) -> dict[str, str]:
    """The recipe's flags among a command's arguments, with their text."""
    if arguments and not hasattr(args, "recipe"):
        raise InputError(
            f"unrecognized arguments: {' '.join(arguments)}; see "
            "`tfamp --help`."
        )
    settings = {}
    rest = list(arguments)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise InputError(
                f"Unexpected argument {name!r}; flags are written "
                "--FLAG=VALUE, after the recipe."
            )
        if not equals:
            has_value = rest and not rest[0].startswith("--")
            text = rest.pop(0) if has_value else "true"
        settings[name.removeprefix("--")] = text
    return settings


def _names(text: str) -> tuple[str, ...]:
    return tuple(canonical(name.strip()) for name in text.split(","))
