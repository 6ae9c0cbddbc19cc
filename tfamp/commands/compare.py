"""`tfamp compare`: where in a recipe's training step 16 bits make error."""

import argparse
import contextlib
import sys
from typing import Any

from tfamp.commands import recipe_argument
from tfamp.files import console


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
    recipe_argument.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.recipe import quiet_tensorflow

    quiet_tensorflow()
    recipe, config = recipe_argument.load(args)

    from tfamp.analysis.shadow.compare import compare
    from tfamp.recipe.subject import open_subject

    # What a recipe prints is not part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        subject = open_subject(recipe, config)
    report = compare(subject.model, next(iter(subject.train_batches), None))
    console.print_text(str(report))
    return int(bool(report.errors))
