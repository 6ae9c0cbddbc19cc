"""The recipe that a command works on, and the flags that are set for it.

`tfamp COMMAND recipes.image_classification --batch_size=128`, as when the
recipe itself is run. `--config.batch_size=128` says the same, also where the
command has a flag of that name itself.
"""

import argparse
import dataclasses
import types
from collections.abc import Sequence
from typing import Any

from tfamp.errors import InputError, did_you_mean
from tfamp.precision.policy import canonical
from tfamp.recipe import load_recipe, saved_model
from tfamp.recipe.flags import SETTING_PREFIX, check_not_reserved, configure


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


def add_to(parser: argparse.ArgumentParser, takes_model: bool = False) -> None:
    """Declares the recipe of a command.

    Args:
        parser: of the command.
        takes_model: whether a `.keras` file can stand in its place.
    """
    model = (
        "; or a saved model, model.keras, with its rows in --data=FILE.npz and "
        "what it imports in --modules=NAME"
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a module, recipes.image_classification, or a file, my/recipe.py;"
        " its flags are set as when it is run, --FLAG=VALUE"
        + model
        * takes_model,
    )
    parser.set_defaults(takes_model=takes_model)


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
    is_model = args.takes_model and is_saved_model(args)
    if is_model:
        saved_model.check_file(args.recipe)
    recipe = saved_model if is_model else load_recipe(args.recipe)
    check_not_reserved(args.settings, reserved, vars(args))
    flags = vars(args).keys() - {"recipe", "run", "settings", "takes_model"}
    config = configure(recipe.Config, args.settings, others=flags)
    if is_model:
        config = dataclasses.replace(config, model_file=args.recipe)
    return recipe, config


def is_saved_model(args: argparse.Namespace) -> bool:
    """Whether a `.keras` file stands in the recipe's place."""
    return args.recipe.endswith(saved_model.SUFFIX)


def require_data(args: argparse.Namespace, config: Any) -> None:
    """Asks for the rows that a step of a saved model needs.

    Raises:
        InputError: there are none.
    """
    if is_saved_model(args) and not config.data:
        raise InputError(
            f"{args.recipe!r} is a model without data, and this command runs "
            "steps; give it rows: --data=FILE.npz, as np.savez(FILE, x=x, y=y) "
            "writes it."
        )


def _flags(
    args: argparse.Namespace, arguments: Sequence[str]
) -> dict[str, str]:
    """The recipe's flags among a command's arguments, with their text."""
    if arguments and not hasattr(args, "recipe"):
        name = arguments[0].partition("=")[0].lstrip("-")
        raise InputError(
            f"unrecognized arguments: {' '.join(arguments)}; see "
            f"`tfamp --help`.{did_you_mean(name, vars(args), '--')}"
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
