"""The part of a report that `tfamp probe` writes."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.page.part import Part
from tfamp.analysis.probe import plots as probe_plots
from tfamp.analysis.probe import tables

_NOTES = (
    "Measured in float32, so that nothing was cut before it was counted; "
    "gradients on each replica, before they are summed, without loss scale.",
    "Shares are of the values that are finite and not zero.",
    "The histograms are of the first steps of training; gradients shrink "
    "later, and dynamic loss scaling follows them.",
)


def part(record: Mapping[str, Any]) -> Part:
    """The part of the page.

    Args:
        record: `probe.json`.
    """
    precision = record["recommended_precision"]
    kept = record["float32_layers"]
    verdict = f"Use {precision}"
    if precision == "mixed_float16":
        verdict += f" at loss scale {record['recommended_scale']:g}"
    if kept:
        layers = "layer" if len(kept) == 1 else "layers"
        verdict += f", with {len(kept)} {layers} in float32"
    plots, notes = [], list(_NOTES)
    if probe_plots.in_16_bits(record):
        plots = [
            probe_plots.gradients(record),
            probe_plots.by_scale(record),
            probe_plots.panels(record),
        ]
    for kind in ("activation_gradient", "activation"):
        if any(tensor["kind"] == kind for tensor in record["tensors"]):
            plots.append(probe_plots.heat_map(record, kind))
    if record["unseen_layers"]:
        notes.append(
            "Not seen, since they run inside of a loop or did not run: "
            f"{', '.join(record['unseen_layers'])}."
        )
    return Part(
        title="Probe",
        verdict=f"{verdict}. {record['reason']}",
        is_good=precision != "float32",
        plots=plots,
        tables=tables.tables(record),
        notes=notes,
    )
