"""`tfamp report`: one page about results that are there already."""

import argparse
import pathlib
from typing import Any


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "report",
        help="one offline page about the results in one or several folders",
        description="Writes report.html from what a recipe's --output_dir, "
        "parity, bench and probe left: verdicts, plots, tables, environment.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", metavar="DIR", nargs="+")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page; report.html in DIR, or here if there are several",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.analysis.report import write

    path = args.output
    if path is None:
        folder = args.folders[0] if len(args.folders) == 1 else "."
        path = pathlib.Path(folder) / write.FILE_NAME
    print(f"Wrote {write.write_combined(args.folders, path)}")
    return 0
