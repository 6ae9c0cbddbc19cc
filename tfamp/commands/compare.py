"""`tfamp compare`: where in a recipe's training step 16 bits make error.

With `--json`: `schema` ("tfamp.compare/1"), `recipe`, and the fields of
`tfamp.analysis.shadow.report.CompareReport`, `errors` the worst first.
"""

import argparse
import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from tfamp.commands import json_flag, recipe_argument
from tfamp.files import console

if TYPE_CHECKING:
    from tfamp.analysis.shadow.report import CompareReport

_SCHEMA = "tfamp.compare/1"


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "compare",
        help="where in a recipe's training step 16 bits make error",
        description="Runs one training step operation by operation, in the "
        "recipe's precision and in float32, and applies nothing. Exits with 1 "
        "if an operation makes more than rounding.",
        allow_abbrev=False,
    )
    recipe_argument.add_to(parser, takes_model=True)
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.recipe import quiet_tensorflow

    quiet_tensorflow()
    recipe, config = recipe_argument.load(args)
    recipe_argument.require_data(args, config)

    from tfamp.analysis.shadow.compare import compare
    from tfamp.recipe.subject import open_subject

    # What a recipe prints is not part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        subject = open_subject(recipe, config)
    report = compare(subject.model, next(iter(subject.train_batches), None))
    if args.json:
        console.print_json(_record(args.recipe, report))
    else:
        console.print_text(str(report))
    return int(bool(report.errors))


def _record(recipe: str, report: "CompareReport") -> dict[str, Any]:
    return {
        "schema": _SCHEMA,
        "recipe": recipe,
        **dataclasses.asdict(report),
    }
