"""The tables of `tfamp export`: each file, and what could not be one."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.page.part import Table

Record = Mapping[str, Any]

_NONE = "-"


def tables(record: Record) -> list[Table]:
    """The files, and the reasons of those that are not there."""
    files = [row for row in record["files"] if row["problem"] is None]
    problems = [row for row in record["files"] if row["problem"] is not None]
    found = []
    if files:
        found.append(_files(record, files))
    if problems:
        found.append(
            Table(
                "Not written",
                ("format", "quantized", "why"),
                [(r["format"], r["kind"], r["problem"]) for r in problems],
            )
        )
    return found


def interval(value) -> str:
    """The difference of a metric, with its confidence interval."""
    if value is None:
        return _NONE
    low, high = (number(each, sign="+") for each in value)
    return f"{low} to {high}"


def number(value: float | None, *, digits: int = 4, sign: str = "") -> str:
    """A figure of a table; "-" where there is none."""
    if value is None:
        return _NONE
    return f"{value:{sign}.{digits}g}" if value else "0"


def share(value: float | None) -> str:
    """A share in percent."""
    return _NONE if value is None else f"{value:.1%}"


def _files(record, rows) -> Table:
    level = f"difference, {1 - 2 * record['alpha']:.0%} interval"
    return Table(
        f"Each file in its own runtime, on {record['examples']} examples",
        (
            "format",
            "quantized",
            record["metric"] or "metric",
            level,
            "verdict",
            "largest difference",
            "same choice",
            "bytes",
            "weights quantized",
            "time / float32",
        ),
        [
            (
                row["format"],
                row["kind"] + _kept(row),
                number(row["metric"]),
                interval(row["interval"]),
                row["verdict"] or _NONE,
                number(row["largest_difference"], digits=2),
                share(row["same_choice"]),
                f"{row['bytes']:,}",
                share(row["quantized_share"]),
                number(row["latency_ratio"], digits=3),
            )
            for row in rows
        ],
    )


def _kept(row) -> str:
    count = len(row["float_layers"])
    return f", {count} in float" if count else ""
