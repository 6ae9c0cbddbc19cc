"""The part of a report that `tfamp export` writes."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.exported import tables
from tfamp.analysis.page.part import Part

_NOTES = (
    "Every file was loaded and run in its own runtime; what did not run, or "
    "differed by more than the tolerance, was removed.",
    "The interval is of the mean difference of the metric to the model in "
    "float32, over pieces of the same data.",
    "Times are medians of runs that took turns with the format's float32 file, "
    "on one thread of this machine.",
)


def part(record: Mapping[str, Any]) -> Part:
    """The part of the page.

    Args:
        record: `export.json`.
    """
    return Part(
        title="Export",
        verdict=verdict(record),
        is_good=record["passed"],
        tables=tables.tables(record),
        notes=[*notes(record), *_NOTES],
    )


def verdict(record: Mapping[str, Any]) -> str:
    """The finding in one or two sentences."""
    files = record["files"]
    written = [row for row in files if row["problem"] is None]
    text = f"{len(written)} of {len(files)} files are written and run."
    if record["metric"] is None:
        return f"{text} The model has no metric that follows from its outputs."
    inside = sum(row["verdict"] == "inside" for row in written)
    return (
        f"{text} {inside} keep {record['metric']} within {record['margin']:g} "
        "of float32."
    )


def notes(record: Mapping[str, Any]) -> list[str]:
    """What is to be said of single files."""
    return [
        f"{row['format']} {row['kind']}: {row['note']}."
        for row in record["files"]
        if row.get("note")
    ]
