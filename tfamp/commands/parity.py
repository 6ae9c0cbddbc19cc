"""`tfamp parity`: whether mixed precision gives what float32 gives."""

import argparse
from typing import Any

from tfamp.commands import json_flag, margin_flags, recipe_argument
from tfamp.files import console

_BOOLEANS = {"auto": None, "true": True, "false": False}


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "parity",
        help="train in each precision, and test whether the results are equal",
        description="Trains a recipe with the same seeds in each precision, "
        "each run in a process of its own, and tests whether the final metric "
        "is equivalent to float32's. Started again, it goes on where it was; "
        "with more seeds, it adds them. The tune.json of `tfamp tune` "
        "is a precision, too. Exit status 1 where equivalence is "
        "not shown.",
        allow_abbrev=False,
    )
    recipe_argument.add_to(parser)
    recipe_argument.add_precisions_to(parser)
    parser.add_argument(
        "--seeds", type=int, default=5, help="runs in each (default: 5)"
    )
    parser.add_argument(
        "--metric",
        help="of those that the recipe's train returns (default: an accuracy, "
        "or else the loss)",
    )
    parser.add_argument(
        "--greater_is_better",
        choices=_BOOLEANS,
        default="auto",
        help="for the words of the verdict (default: by the metric's name)",
    )
    margin_flags.add_to(parser)
    parser.add_argument(
        "--output_dir",
        required=True,
        help="folder for parity.json, report.html and the runs",
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.analysis.page import plots
    from tfamp.analysis.parity import series, tables
    from tfamp.analysis.parity.equivalence import require_scipy
    from tfamp.analysis.parity.question import Question
    from tfamp.analysis.report import write

    # Nobody wants to hear of it after an hour of training.
    plots.require_matplotlib()
    require_scipy()
    question = Question(
        recipe=args.recipe,
        settings=args.settings,
        precisions=args.precisions,
        seeds=args.seeds,
        margin=args.margin,
        metric=args.metric,
        greater_is_better=_BOOLEANS[args.greater_is_better],
        alpha=args.alpha,
    )
    with console.aside(args.json):
        record = series.measure(question, args.output_dir)
        page = write.write(args.output_dir)
    console.print_report(
        args.json,
        record,
        *map(console.filled, tables.tables(record)),
        record["verdict"],
        f"The report: {page}",
    )
    return 0 if all(record["equivalent"].values()) else 1
