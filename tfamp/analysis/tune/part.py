"""The part of a report that `tfamp tune` writes."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.page.part import Part
from tfamp.analysis.tune import tables

_NOTES = (
    "Measured, not estimated: the gradient of whole steps, against the same "
    "steps in float32, with dropout and seeds alike.",
    "The noise is how far the gradient of one batch is from the mean of all "
    "that were measured, relative to its length.",
    "Times are of this machine, without the update and without XLA.",
)


def part(record: Mapping[str, Any]) -> Part:
    """The part of the page.

    Args:
        record: `tune.json`.
    """
    kept = [each["layer"] for each in record["float32_layers"]]
    verdict = f"{record['precision']} for all layers"
    if kept:
        layers = "layer" if len(kept) == 1 else "layers"
        verdict = (
            f"{record['precision']}, with {len(kept)} {layers} in float32: "
            f"{', '.join(kept)}"
        )
    notes = list(_NOTES)
    if record["precision"] == "mixed_float16":
        notes.append(f"At loss scale {record['loss_scale']:g}.")
    if record["unseen_layers"]:
        notes.append(f"No step called {', '.join(record['unseen_layers'])}.")
    notes.append(f"{record['runs']} steps in {record['seconds']:.0f} seconds.")
    error = record["path"][-1]["error"]
    return Part(
        title="Tune",
        verdict=f"{verdict}. {record['reason']}",
        is_good=error is not None and error <= record["limit"],
        tables=tables.tables(record),
        notes=notes,
    )
