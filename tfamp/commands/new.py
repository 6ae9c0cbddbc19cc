"""`tfamp new`: a recipe of one's own to begin with."""

import argparse
import importlib.resources
import keyword
import pathlib
from typing import Any

from tfamp.commands import json_flag
from tfamp.errors import InputError
from tfamp.files import console


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "new",
        help="write a recipe to put your own model and data into",
        description="Writes NAME.py: a commented recipe that runs at once.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "name", metavar="NAME", help="of the recipe: my_model, or a/my_model.py"
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    path = pathlib.Path(args.name.removesuffix(".py") + ".py")
    # `python -m NAME` and `tfamp lint NAME` import it by this name.
    if not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise InputError(
            f"{path.stem!r} cannot name a Python module; expected letters, "
            "digits and underscores, such as my_model."
        )
    template = importlib.resources.files("tfamp.recipe") / "template.py"
    text = template.read_text(encoding="utf-8").replace("NAME.py", str(path))
    try:
        # "x" never writes over a file that is there.
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(
            f"{path} is there already; choose another name."
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}."
        ) from None
    if args.json:
        console.print_json({"schema": "tfamp.new/1", "path": str(path)})
    else:
        print(f"Wrote {path}. It runs at once: python {path}")
    return 0
