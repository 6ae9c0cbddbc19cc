"""`tfamp bench`: speed and memory of each precision, as ratios to float32."""

import argparse
from typing import Any

from tfamp.commands import json_flag, recipe_argument
from tfamp.files import console


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "bench",
        help="speed and memory of each precision, as ratios to float32",
        description="Trains a recipe in each precision, in processes of their "
        "own and in turn, and compares step time and peak memory with float32 "
        "at the same batch. Says where a ratio says little.",
        allow_abbrev=False,
    )
    recipe_argument.add_to(parser)
    recipe_argument.add_precisions_to(parser)
    parser.add_argument(
        "--steps",
        type=int,
        default=20,
        help="to time in each run, at least, after the warm-up (default 20)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="runs of each precision, in turn (default 5)",
    )
    parser.add_argument(
        "--largest_batch",
        action="store_true",
        help="look for the largest batch that fits in each precision, too",
    )
    parser.add_argument(
        "--memory_limit_gib",
        type=float,
        metavar="GIB",
        help="what a process may take in that search, on a CPU",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="leave traces for TensorBoard in OUTPUT_DIR/profile",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        help="folder for bench.json, report.html and the logs of the runs",
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.analysis.bench import part, series, tables
    from tfamp.analysis.bench.plan import Plan
    from tfamp.analysis.page import plots
    from tfamp.analysis.report import write
    from tfamp.recipe import quiet_tensorflow

    quiet_tensorflow()
    # Nobody wants to hear of it after all runs.
    plots.require_matplotlib()
    plan = Plan(
        recipe=args.recipe,
        settings=args.settings,
        precisions=args.precisions,
        steps=args.steps,
        rounds=args.rounds,
        largest_batch=args.largest_batch,
        memory_limit_gib=args.memory_limit_gib,
        profile=args.profile,
    )
    with console.aside(args.json):
        record = series.measure(plan, args.output_dir)
        page = write.write(args.output_dir)
    if args.json:
        console.print_json(record)
        return 0
    console.print_text(
        *map(console.filled, tables.tables(record)),
        part.verdict(record),
        *(callout["message"] for callout in record["callouts"]),
        f"The report: {page}",
    )
    return 0
