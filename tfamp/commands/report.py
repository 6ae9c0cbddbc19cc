"""`tfamp report`: one page about results that are there already.

With `--json`: `schema` ("tfamp.report/1"), `path` of the page, and `parts`,
each `folder`, `title`, `subject` (the recipe), `verdict`, `is_good` (null where
there is nothing to judge), `is_undecided`.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tfamp.commands import json_flag
from tfamp.files import console

if TYPE_CHECKING:
    from tfamp.analysis.page.html import Chapter


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "report",
        help="one offline page about the results in one or several folders",
        description="Writes report.html from what a recipe's --output_dir, "
        "parity, bench and probe left: verdicts, plots, tables, environment. "
        "Runs in several folders are drawn over each other and compared.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", metavar="DIR", nargs="+")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page; report.html in DIR, or here if there are several",
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.analysis.report import write

    path = args.output
    if path is None:
        folder = args.folders[0] if len(args.folders) == 1 else "."
        path = pathlib.Path(folder) / write.FILE_NAME
    chapters = write.chapters_of(args.folders)
    path = write.write_page(chapters, path)
    if args.json:
        console.print_json(_record(path, chapters))
    else:
        print(f"Wrote {path}")
    return 0


def _record(path: pathlib.Path, chapters: "Sequence[Chapter]") -> dict:
    return {
        "schema": "tfamp.report/1",
        "path": str(path),
        "parts": [
            {
                "folder": name,
                "title": part.title,
                "subject": part.subject,
                "verdict": part.verdict,
                "is_good": part.is_good,
                "is_undecided": part.is_undecided,
            }
            for name, parts in chapters
            for part in parts
        ],
    }
