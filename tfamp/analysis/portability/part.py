"""The part of a report that `tfamp portability` writes."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.page.part import Part
from tfamp.analysis.portability import tables

_NOTES = (
    "Each precision was computed on this machine: the numbers that a device "
    "can hold are the same there, the order of its sums is not.",
    "The interval is of the mean difference of the metric to the model in "
    "float32, over pieces of the same data.",
)


def part(record: Mapping[str, Any]) -> Part:
    """The part of the page.

    Args:
        record: `portability.json`.
    """
    return Part(
        title="Portability",
        verdict=verdict(record),
        is_good=record["passed"],
        tables=tables.tables(record),
        notes=_NOTES,
    )


def verdict(record: Mapping[str, Any]) -> str:
    """The finding in one sentence."""
    name = record["metric"] or "the largest output"
    failing = [
        f"{row['device']} ({row['precision']})"
        for row in record["devices"]
        if row["verdict"] != "inside"
    ]
    if not failing:
        return (
            f"As good as in float32, within {record['margin']:g} of {name}, on "
            f"{', '.join(row['device'] for row in record['devices'])}."
        )
    return (
        f"Not shown to be within {record['margin']:g} of {name} in float32 on "
        f"{', '.join(failing)}."
    )
