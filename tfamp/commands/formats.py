"""`tfamp formats`: the number formats, and what a value becomes in each."""

import argparse
import dataclasses
import math
from decimal import Decimal, InvalidOperation
from typing import Any

from rich.table import Table
from rich.text import Text

from tfamp import formats
from tfamp.commands import json_flag
from tfamp.files import console

_KIND_STYLES = {
    "exact": "green",
    "subnormal": "yellow",
    "zero": "red",
    "overflow": "red",
}

_FORMAT_LEGEND = (
    "s+e+m: bits of sign, exponent, mantissa; epsilon: spacing from 1 to 2"
)


def add_to(commands: Any) -> None:
    """Declares the command."""
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
    json_flag.add_to(parser)
    parser.set_defaults(run=_run)


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


def _run(args: argparse.Namespace) -> int:
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
