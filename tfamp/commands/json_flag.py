"""`--json`, which every command has: one object on stdout, and nothing else."""

import argparse


def add_to(parser: argparse.ArgumentParser) -> None:
    """Declares the flag."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object; what is said on the way goes to stderr",
    )
