"""`tfamp tune`: each layer's precision, by measured sensitivity."""

import argparse
import dataclasses
from typing import Any

from tfamp.commands import json_flag, recipe_argument
from tfamp.errors import InputError
from tfamp.files import console

_PRECISIONS = {
    "bfloat16": "mixed_bfloat16",
    "float16": "mixed_float16",
    "float8": "float8",
}


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "tune",
        help="measure how sensitive each layer is; which ones need float32",
        description="Measures how far each layer of a recipe alone moves the "
        "gradient when it computes in 16 bits, and puts layers back to float32 "
        "until the error is a small share of the gradient's noise. Any recipe "
        "takes the result: --precision_map=D/tune.json.",
        allow_abbrev=False,
    )
    recipe_argument.add_to(parser, takes_model=True)
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="batches to measure on (default: 4)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=0.1,
        help="the error allowed, as a share of the gradient's noise between "
        "batches (default: 0.1)",
    )
    parser.add_argument(
        "--formats",
        default="auto",
        help="bfloat16, float16, float8, or a comma list, of which the later "
        "ones' results are tune-FORMAT.json (default: what suits the device)",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="folder for tune.json and report.html",
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.analysis.page import plots
    from tfamp.files.output import make_folder, output_folder

    formats = _formats(args.formats)
    precisions = [_precision(name) for name in formats]
    if args.steps < 2:
        raise InputError(f"--steps={args.steps} must be at least 2.")
    if not 0 < args.budget < float("inf"):
        raise InputError(f"--budget={args.budget:g} must be above 0.")
    plots.require_matplotlib()
    folder = output_folder(args.output_dir)
    recipe, config = recipe_argument.load(
        args, "precision", "precision_map", "output_dir"
    )
    recipe_argument.require_data(args, config)
    make_folder(folder)

    from tfamp.analysis.report import write

    first = None
    with console.aside(args.json):
        for name, precision in zip(formats, precisions, strict=True):
            # The recipe's own choice of float32 layers shows in 16 bits only.
            config = dataclasses.replace(config, precision=precision)
            found = _tune(recipe, config, args)
            found = dataclasses.replace(found, recipe=args.recipe)
            file_name = f"tune-{name}.json" if first else "tune.json"
            found.save(folder / file_name)
            first = first or found
            print(f"{folder / file_name}")
            _print(found.record())
        console.print_text(f"The report: {write.write(folder)}")
    if args.json and first:
        console.print_json(first.record())
    return 0


def _tune(recipe, config, args: argparse.Namespace):
    from tfamp.analysis.tune.measure import tune
    from tfamp.recipe.subject import open_subject

    subject = open_subject(recipe, config)
    print(f"measuring {args.steps} batches, layer by layer", flush=True)
    return tune(
        subject.model,
        subject.train_batches,
        steps=args.steps,
        budget=args.budget,
        precision=config.precision,
        microbatches=getattr(config, "microbatches", 1),
    )


def _precision(name: str) -> str:
    if name != "auto":
        return _PRECISIONS[name]

    from tfamp.analysis.tune.measure import default_precision

    return default_precision()


def _formats(text: str) -> tuple[str, ...]:
    if text == "auto":
        return (text,)
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in _PRECISIONS:
            raise InputError(
                f"--formats={text}: {name!r} cannot be tuned; expected some of "
                f"{', '.join(_PRECISIONS)}."
            )
    if len(set(names)) < len(names):
        raise InputError(f"--formats={text} names one twice.")
    return names


def _print(record: dict[str, Any]) -> None:
    from tfamp.analysis.tune import tables

    console.print_text(
        *map(console.filled, tables.tables(record)), record["reason"]
    )
