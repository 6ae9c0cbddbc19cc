"""`--margin` and `--alpha`: what a test of equivalence is asked."""

import argparse


def add_to(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument(
        "--margin",
        type=float,
        default=0.01,
        help="the largest difference that does not matter, in the metric's "
        "own unit (default: 0.01)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        help="the chance to call equal what differs by the margin "
        "(default: 0.05)",
    )
