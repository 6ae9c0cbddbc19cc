"""`tfamp portability`: a trained recipe in what other hardware computes in."""

import argparse
import dataclasses
from typing import Any

from tfamp.commands import json_flag, recipe_argument, trained_argument
from tfamp.files import console


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "portability",
        help="whether a trained model is as good on other hardware",
        description="Evaluates a recipe's model in each precision that some "
        "devices would compute it in, and tests whether its metric is as good "
        "as in float32. Exit status 1 where that is not shown.",
        allow_abbrev=False,
    )
    recipe_argument.add_to(parser, takes_model=True)
    trained_argument.add_to(parser)
    parser.add_argument(
        "--assume",
        required=True,
        metavar="NAMES",
        help="devices, a comma list: T4, V100, A100, H100, MI300, 'TPU v5e' "
        "and others that `tfamp doctor` knows, cpu, 'cpu amx'",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="folder for portability.json and report.html",
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    trained_argument.check(args)

    from tfamp.analysis.portability import measure, part, tables
    from tfamp.analysis.report import write
    from tfamp.files.output import make_folder, output_folder, write_json
    from tfamp.recipe import quiet_tensorflow

    quiet_tensorflow()

    names = [each.strip() for each in args.assume.split(",") if each.strip()]
    hardware = measure.devices(names)
    folder = output_folder(args.output_dir)
    recipe, config = recipe_argument.load(args, "precision", "output_dir")
    recipe_argument.require_data(args, config)
    make_folder(folder)

    def opened(precision):
        here = dataclasses.replace(config, precision=precision)
        return trained_argument.open_trained(args, recipe, here)

    with console.aside(args.json):
        subject = opened("float32")
        record = {
            **measure.measure(
                lambda name: (
                    subject.model if name == "float32" else opened(name).model
                ),
                subject.eval_batches,
                hardware,
                metric=args.metric,
                margin=args.margin,
                alpha=args.alpha,
                steps=args.steps,
                say=lambda text: print(text, flush=True),
            ),
            **trained_argument.described(args),
        }
        write_json(folder / "portability.json", record)
        page = write.write(folder)
    console.print_report(
        args.json,
        record,
        *map(console.filled, tables.tables(record)),
        part.verdict(record),
        f"The report: {page}",
    )
    return 0 if record["passed"] else 1
