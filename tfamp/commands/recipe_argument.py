"""The recipe that a command works on, and the fields that are set for it.

`tfamp COMMAND recipes.image_classification --config.batch_size=128`
"""

import argparse
import types
from typing import Any

from tfamp.errors import InputError
from tfamp.recipe import load_recipe
from tfamp.recipe.flags import SETTING_PREFIX, configure


def attach_settings(args: argparse.Namespace, settings: dict[str, str]) -> None:
    """Hands the settings to a command that takes a recipe.

    Raises:
        InputError: the command takes none.
    """
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
        " --config.FIELD=VALUE sets its flags",
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
    return recipe, configure(recipe.Config, args.settings)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))
