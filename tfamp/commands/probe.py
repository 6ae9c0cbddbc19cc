"""`tfamp probe`: what 16-bit formats would lose of a recipe's training."""

import argparse
import dataclasses
import pathlib
from typing import Any

from tfamp.commands import json_flag, recipe_argument
from tfamp.errors import InputError
from tfamp.files import console


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "probe",
        help="measure a few training steps; which loss scale, which layers",
        description="Measures a few training steps of a recipe: how much of "
        "each gradient and output float16 and bfloat16 would lose, at every "
        "loss scale. Advises a precision, a loss scale and layers for "
        "float32, and compares with a step in float16.",
        allow_abbrev=False,
    )
    recipe_argument.add_to(parser, takes_model=True)
    parser.add_argument(
        "--steps", type=int, default=8, help="to measure (default: 8)"
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="folder for probe.json and report.html",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="leave the histograms in OUTPUT_DIR/tensorboard too",
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.analysis.page import plots
    from tfamp.files.output import make_folder, output_folder

    if args.steps < 1:
        raise InputError(f"--steps={args.steps} must be at least 1.")
    plots.require_matplotlib()
    folder = output_folder(args.output_dir)
    recipe, config = recipe_argument.load(args, "precision", "output_dir")
    recipe_argument.require_data(args, config)
    # The recipe's own choice of float32 layers shows in a 16-bit model only.
    config = dataclasses.replace(config, precision=_precision())
    make_folder(folder)

    from tfamp.analysis.report import write

    with console.aside(args.json):
        found = _probe(recipe, config, args.steps)
        found = dataclasses.replace(found, recipe=args.recipe)
        found.save(folder / "probe.json")
        if args.tensorboard:
            from tfamp.analysis.probe.tensorboard import write_histograms

            write_histograms(found.record(), folder / "tensorboard")
        page = write.write(folder)
    if args.json:
        console.print_json(found.record())
    else:
        _print(found.record(), page)
    return 0


def _precision() -> str:
    from tfamp.hardware.devices import detect_hardware

    is_tpu = detect_hardware().kind == "tpu"
    return "mixed_bfloat16" if is_tpu else "mixed_float16"


def _probe(recipe, config, steps: int):
    from tfamp.analysis.probe.measure import probe
    from tfamp.analysis.probe.observed import observe
    from tfamp.recipe.subject import open_subject

    subject = open_subject(recipe, config)
    print(f"measuring {steps} steps in float32", flush=True)
    found = probe(subject.model, subject.train_batches, steps=steps)
    scale = found.advice.float16_scale
    if scale is None or config.precision != "mixed_float16":
        return found
    print(f"the same in float16 at loss scale {scale:g}", flush=True)
    observations = observe(
        subject.model,
        next(iter(subject.train_batches)),
        scale,
        found.float32_layers,
        after=subject.train_batches.take(found.steps),
    )
    return dataclasses.replace(
        found, observations=tuple(observations), observed_scale=scale
    )


def _print(record: dict[str, Any], page: pathlib.Path) -> None:
    from tfamp.analysis.probe import tables

    console.print_text(
        *map(console.filled, tables.tables(record)),
        record["reason"],
        f"The report: {page}",
    )
