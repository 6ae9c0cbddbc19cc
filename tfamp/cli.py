"""The command line: `tfamp doctor`, `tfamp formats`.

A command is one `_add_NAME` function that declares its arguments and one
`_NAME` function that runs it and returns the exit status. Bad input, here or
in the library, is an `InputError`: one line on stderr and exit status 2.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from rich.table import Table
from rich.text import Text

from tfamp import console, formats
from tfamp.errors import InputError
from tfamp.version import __version__

_KIND_STYLES = {
    "exact": "green",
    "subnormal": "yellow",
    "zero": "red",
    "overflow": "red",
}

_FORMAT_LEGEND = (
    "s+e+m: bits of sign, exponent, mantissa; epsilon: spacing from 1 to 2"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit status: 0, or 2 for bad input.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser().parse_args([_shield_negative(a) for a in argv])
        return args.run(args)
    except InputError as error:
        print(f"tfamp: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as `head`, has gone. Python flushes stdout once
        # more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line instead of a usage page."""

    def error(self, message: str):
        raise InputError(f"{message}; see `{self.prog} --help`.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tfamp",
        description="Mixed-precision training for Keras 3 on TensorFlow.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_doctor(commands)
    _add_formats(commands)
    return parser


def _shield_negative(argument: str) -> str:
    # argparse takes -1e-8 and -inf for options. A leading blank makes them
    # positional, and does not change the number.
    if argument.startswith("-"):
        with contextlib.suppress(ValueError):
            float(argument)
            return f" {argument}"
    return argument


# tfamp doctor


def _add_doctor(commands: Any) -> None:
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
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from tfamp.doctor import diagnose, report_sections

    report = diagnose(args.assume)
    if args.json:
        console.print_json(report)
    else:
        console.print_text(*report_sections(report))
    return 0


# tfamp formats


def _add_formats(commands: Any) -> None:
    parser = commands.add_parser(
        "formats",
        help="the number formats, and what a value becomes in each",
        description="Without values: range and spacing of each format. With "
        "values: what each becomes in each format, and its relative error.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "values",
        metavar="VALUE",
        nargs="*",
        type=_number,
        help="such as 1e-8, -70000, inf",
    )
    parser.add_argument(
        "--scale",
        type=_scale,
        help="also multiply by this power of two, round, and unscale in "
        "float32, as loss scaling does",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_formats)


def _number(text: str) -> float:
    text = text.strip()
    try:
        exact = Decimal(text)
        value = float(exact)
    except (InvalidOperation, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number; expected such as 1e-8, -70000 or inf"
        ) from None
    if exact.is_finite() and (math.isinf(value) or (exact and value == 0)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is beyond float64; expected 0 or 5e-324 to 1.8e308"
        )
    return value


def _scale(text: str) -> float:
    value = _number(text)
    try:
        formats.check_scale(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
    return value


def _formats(args: argparse.Namespace) -> int:
    if args.json:
        console.print_json(
            {
                "schema": "tfamp.formats/1",
                "formats": [
                    dataclasses.asdict(f) for f in formats.FORMATS.values()
                ],
                "scale": args.scale,
                "conversions": [
                    _conversion_record(value, target, args.scale)
                    for value in args.values
                    for target in formats.FORMATS.values()
                ],
            }
        )
    elif not args.values:
        console.print_text(_format_table(), _FORMAT_LEGEND)
    elif args.scale is None:
        console.print_text(*map(_conversion_table, args.values))
    else:
        console.print_text(
            *(_scaled_conversion_table(v, args.scale) for v in args.values)
        )
    return 0


def _conversion_record(
    value: float, target: formats.Format, scale: float | None
) -> dict[str, Any]:
    record = dataclasses.asdict(formats.convert(value, target))
    if scale is not None:
        scaled = formats.convert_scaled(value, target, scale)
        record["scaled"] = dataclasses.asdict(scaled)
    return record


def _format_table() -> Table:
    table = console.table(
        "format",
        "bits",
        "s+e+m",
        "max",
        "min normal",
        "min subnormal",
        "epsilon",
    )
    for f in formats.FORMATS.values():
        table.add_row(
            f.name,
            str(f.bits),
            f"1+{f.exponent_bits}+{f.mantissa_bits}",
            *(
                f"{figure:.5g}"
                for figure in (f.max, f.min_normal, f.min_subnormal, f.epsilon)
            ),
        )
    return table


def _conversion_table(value: float) -> Table:
    table = console.table(
        "format", "becomes", "kind", "relative error", title=_exact(value)
    )
    for target in formats.FORMATS.values():
        plain = formats.convert(value, target)
        table.add_row(target.name, *_outcome(plain.result, plain))
    return table


def _scaled_conversion_table(value: float, scale: float) -> Table:
    table = console.table(
        "format",
        "scale",
        "in the format",
        "unscaled",
        "kind",
        "relative error",
        title=f"{_exact(value)}, times {_exact(scale)}: {value * scale:.6g}",
    )
    for target in formats.FORMATS.values():
        plain = formats.convert(value, target)
        through = formats.convert_scaled(value, target, scale)
        held, scaled_held = plain.result, through.scaled.result
        table.add_row(target.name, "1", f"{held:.6g}", *_outcome(held, plain))
        table.add_row(
            "",
            f"{scale:.6g}",
            f"{scaled_held:.6g}",
            *_outcome(through.result, through),
        )
    return table


def _outcome(
    result: float, conversion: formats.Conversion | formats.ScaledConversion
) -> tuple[str, Text, str]:
    kind = conversion.kind
    return (
        f"{result:.6g}",
        Text(kind, style=_KIND_STYLES.get(kind, "")),
        f"{conversion.relative_error:.3g}",
    )


def _exact(value: float) -> str:
    return repr(value).removesuffix(".0")
