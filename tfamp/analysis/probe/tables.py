"""The tables of `tfamp probe`: its advice, and the layers that lose most."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.page.part import Table
from tfamp.analysis.probe import plots

Record = Mapping[str, Any]

_ROWS = 12


def tables(record: Record) -> list[Table]:
    """Advice; what is lost; what was foretold and what was seen."""
    found = [advice(record), losses(record)]
    if record["observed"]:
        found.append(observations(record))
    return found


def advice(record: Record) -> Table:
    """What to do."""
    scale = record["float16_scale"]
    return Table(
        "Advice",
        ("setting", "value"),
        [
            ("precision", record["recommended_precision"]),
            ("loss scale", f"{record['recommended_scale']:g}"),
            (
                "best loss scale for float16",
                "none" if scale is None else f"{scale:g}",
            ),
            ("layers for float32", ", ".join(record["float32_layers"]) or "-"),
            ("steps measured", str(record["steps"])),
        ],
    )


def losses(record: Record) -> Table:
    """The tensors that lose most in float16, with and without scaling."""
    scale = record["float16_scale"] or 1.0
    best = record["scales"].index(scale)
    outputs = [t for t in record["tensors"] if t["kind"] == "activation"]
    outputs.sort(key=_overflow, reverse=True)
    large = [t for t in outputs if _overflow(t)][:_ROWS]
    worst = plots.worst_tensors(record)[:_ROWS]
    rows = []
    for tensor in (*large, *worst):
        float16 = tensor["losses"]["float16"]
        bfloat16 = tensor["losses"]["bfloat16"]
        # The loss scale does not move outputs.
        scaled = best if tensor in worst else 0
        rows.append(
            (
                plots.label(tensor),
                tensor["kind"].replace("_", " "),
                _percent(float16["zero"][0]),
                _percent(float16["subnormal"][0]),
                _percent(float16["zero"][scaled]),
                _percent(float16["subnormal"][scaled]),
                _percent(float16["overflow"][scaled]),
                _percent(bfloat16["zero"][0] + bfloat16["overflow"][0]),
            )
        )
    gradients = len(plots.in_16_bits(record))
    return Table(
        f"What float16 loses, at scale 1 and at {scale:g}: outputs that "
        f"overflow, and the worst {len(worst)} of {gradients} gradients",
        (
            "tensor",
            "kind",
            "zero",
            "subnormal",
            "zero, scaled",
            "subnormal, scaled",
            "overflow, scaled",
            "bfloat16 loses",
        ),
        rows,
    )


def observations(record: Record) -> Table:
    """Predicted against observed, where they differ or lose most."""
    observed = record["observed"]

    def lost(each):
        shares = (each["predicted"], each["observed"])
        return max(s["zero"] + s["overflow"] + s["subnormal"] for s in shares)

    rows = sorted(observed["tensors"], key=lost, reverse=True)
    return Table(
        f"Predicted and observed in mixed_float16 at scale "
        f"{observed['scale']:g}, the same batch: the {min(_ROWS, len(rows))} "
        f"of {len(rows)} tensors that lose most",
        (
            "tensor",
            "kind",
            *(
                f"{share}, {which}"
                for share in ("zero", "subnormal", "overflow")
                for which in ("predicted", "observed")
            ),
        ),
        [
            (
                plots.label(each),
                each["kind"].replace("_", " "),
                *(
                    _percent(each[which][share])
                    for share in ("zero", "subnormal", "overflow")
                    for which in ("predicted", "observed")
                ),
            )
            for each in rows[:_ROWS]
        ],
    )


def _overflow(tensor: Mapping[str, Any]) -> float:
    return tensor["losses"]["float16"]["overflow"][0]


def _percent(share: float) -> str:
    return f"{share:.2%}"
