"""The tables of `tfamp tune`: the choice, the path, the scores, the costs."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.page.part import Table

Record = Mapping[str, Any]

_ROWS = 15
_CHOICES = {
    "float32": "all in float32",
    "all": "all in {}",
    "tuned": "as tuned",
}


def tables(record: Record) -> list[Table]:
    """What to do, how it came to that, and what it costs."""
    return [path(record), scores(record), costs(record)]


def path(record: Record) -> Table:
    """The layers put back, and what is left of the error after each."""
    why = {each["layer"]: each["reason"] for each in record["float32_layers"]}
    return Table(
        f"Put back to float32, one after the other, until the gradient's error "
        f"is at most {record['limit']:.2%}",
        ("layer", f"error of the rest in {_bits(record)}", "why"),
        [
            (
                each["layer"] or "none",
                percent(each["error"]),
                why.get(each["layer"], "-"),
            )
            for each in record["path"]
        ],
    )


def scores(record: Record) -> Table:
    """The most sensitive layers."""
    shown = record["scores"][:_ROWS]
    kept = {each["layer"] for each in record["float32_layers"]}
    return Table(
        f"The gradient's error with one layer alone in {_bits(record)}: the "
        f"{len(shown)} largest of {len(record['scores'])}",
        ("layer", "error", "precision"),
        [
            (
                each["layer"],
                percent(each["score"]),
                "float32" if each["layer"] in kept else record["precision"],
            )
            for each in shown
        ],
    )


def costs(record: Record) -> Table:
    """Error, time, and matrix products of the model as it runs."""
    whole = record["costs"]["float32"]["milliseconds"]
    shares = record["narrow_shares"] or {}
    return Table(
        "The model as it runs: forward and backward passes of one batch",
        (
            "layers",
            "gradient's error",
            "milliseconds",
            "of float32's time",
            "products not in float32",
        ),
        [
            (
                words.format(_bits(record)),
                percent(cost["error"]),
                f"{cost['milliseconds']:.1f}",
                f"{cost['milliseconds'] / whole:.2f}",
                "-" if name not in shares else f"{shares[name]:.0%}",
            )
            for name, words in _CHOICES.items()
            for cost in [record["costs"][name]]
        ],
    )


def _bits(record: Record) -> str:
    return "8 bits" if record["precision"] == "float8" else "16 bits"


def percent(share: float | None) -> str:
    """A share; None is one that is not finite."""
    return "not finite" if share is None else f"{share:.2%}"
