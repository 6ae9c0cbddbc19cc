"""`tfamp doctor`: the devices here, and what suits them."""

import argparse
from typing import Any

from tfamp.commands import json_flag
from tfamp.files import console


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "doctor",
        help="the devices here, the precision and strategy that suit them",
        description="Shows hardware and versions, the precision and strategy "
        "that suit them and why, and what is known to fail with them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--assume",
        metavar="NAME",
        help="judge this device instead: V100, T4, A100, H100, MI300, "
        "'TPU v5e' and others",
    )
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tfamp.hardware.doctor import diagnose, report_sections

    report = diagnose(args.assume)
    if args.json:
        console.print_json(report)
    else:
        console.print_text(*report_sections(report))
    return 0
