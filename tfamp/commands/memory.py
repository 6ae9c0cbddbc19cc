"""`tfamp memory`: what a training needs on each of several devices."""

import argparse
import contextlib
import dataclasses
import sys
from typing import Any

from tfamp.commands import json_flag, recipe_argument
from tfamp.errors import InputError
from tfamp.files import console

_GB = 1e9
_SHARDS = {"off": (False,), "on": (True,), "both": (False, True)}


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "memory",
        help="bytes on each device: weights, masters, moments, gradients",
        description="Counts what a recipe's training holds on each of several "
        "devices, in each precision, without and with shards. Every device "
        "has the recipe's batch. What kernels work in is not counted.",
        allow_abbrev=False,
    )
    recipe_argument.add_to(parser)
    recipe_argument.add_precisions_to(parser)
    parser.add_argument(
        "--replicas",
        default="1",
        help="how many devices, a comma list (default: 1)",
    )
    parser.add_argument(
        "--shard",
        choices=_SHARDS,
        default="both",
        help="masters and moments in shards (default: both ways)",
    )
    parser.add_argument(
        "--weights",
        type=float,
        help="a model of so many weights instead, as 7e9, with the recipe's "
        "optimizer; what it keeps of activations is not known",
    )
    parser.add_argument(
        "--device_gb",
        type=float,
        help="memory of a device, in 10^9 bytes: says what fits",
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.recipe import quiet_tensorflow

    quiet_tensorflow()
    replicas = _replicas(args.replicas)
    for name in ("weights", "device_gb"):
        value = getattr(args, name)
        if value is not None and not 1 <= value < 1e18:
            raise InputError(f"--{name}={value:g} must be at least 1.")
    # The recipe may print, and standard output is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        rows = [
            row
            for counted in _counted(args)
            for row in _rows(counted, replicas, args.device_gb)
        ]
    if args.json:
        console.print_json({"schema": "tfamp.memory/1", "devices": rows})
    else:
        console.print_text(_table(rows, args))
    return 0


def _replicas(text: str) -> list[int]:
    try:
        counts = [int(each) for each in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise InputError(
            f"--replicas={text}; expected whole numbers from 1, as 1,8,64."
        )
    return counts


def _counted(args: argparse.Namespace) -> list:
    import keras

    from tfamp.analysis.memory import arithmetic
    from tfamp.recipe.subject import open_subject

    recipe, config = recipe_argument.load(
        args, "precision", "shard", "strategy", "num_devices", "output_dir"
    )
    fields = {field.name for field in dataclasses.fields(config)}
    if True in _SHARDS[args.shard] and "shard" not in fields:
        raise InputError(
            f"Recipe {args.recipe!r} has no field 'shard'; derive its Config "
            "from tfamp.recipe.RunConfig, or use --shard=off."
        )
    counted = []
    for precision in args.precisions:
        for shard in _SHARDS[args.shard]:
            here = dataclasses.replace(
                config, precision=precision, strategy="one_device"
            )
            if "shard" in fields:
                here = dataclasses.replace(here, shard="on" if shard else "off")
            found = arithmetic.count(open_subject(recipe, here), precision)
            if shard and not found.shard:
                raise InputError(
                    f"Recipe {args.recipe!r} does not hand on its field "
                    "'shard'; give it to tfamp.wrap_optimizer, or use "
                    "--shard=off."
                )
            if args.weights is not None:
                found = arithmetic.of_size(
                    precision, shard, args.weights, found.moments
                )
            counted.append(found)
            keras.backend.clear_session()
    return counted


def _rows(counted, replicas: list[int], device_gb: float | None) -> list[dict]:
    from tfamp.analysis.memory import arithmetic

    rows = [arithmetic.row(counted, count) for count in replicas]
    if device_gb is not None:
        for each in rows:
            each["fits"] = each["total_bytes"] <= device_gb * _GB
    return rows


def _table(rows: list[dict], args: argparse.Namespace):
    parts = ("weights", "masters", "moments", "gradients", "kept", "total")
    unit, name = (_GB, "GB") if args.weights else (1e6, "MB")
    fits = ["fits"] if args.device_gb else []
    table = console.table(
        "precision",
        "shards",
        "devices",
        *parts,
        *fits,
        title=f"{name} on each device, the recipe's batch on each",
    )
    for row in rows:
        table.add_row(
            row["precision"],
            "on" if row["shard"] else "off",
            str(row["replicas"]),
            *(f"{row[f'{part}_bytes'] / unit:.2f}" for part in parts),
            *(["yes" if row["fits"] else "no"] if fits else []),
        )
    return table
