"""A model evaluated in each precision that devices would compute it in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp.analysis.exported import pieces, verdict
from tfamp.analysis.parity.final_metric import choose_metric
from tfamp.errors import InputError, did_you_mean
from tfamp.hardware.devices import KNOWN_HARDWARE, Hardware, recommend
from tfamp.hardware.doctor import known_hardware

SCHEMA = "tfamp.portability/1"
# Beside the devices that `tfamp doctor` knows.
_CPUS: dict[str, Hardware] = {
    "cpu": Hardware("cpu", ("CPU without bfloat16",), cpu_bf16=()),
    "cpu amx": Hardware("cpu", ("CPU with AMX",), cpu_bf16=("amx_bf16",)),
}


def devices(names: Sequence[str]) -> dict[str, Hardware]:
    """Devices by the names that they were asked for.

    Raises:
        InputError: for a name that is not known, or none.
    """
    found = {}
    for name in names:
        cpu = _CPUS.get(" ".join(name.casefold().replace("_", " ").split()))
        try:
            found[name] = cpu or known_hardware(name)
        except InputError as error:
            known = [*KNOWN_HARDWARE, *_CPUS]
            raise InputError(
                f"Unknown hardware {name!r}; expected one of "
                f"{', '.join(known)}.{did_you_mean(name, known)}"
            ) from error
    if not found:
        raise InputError("No hardware is named; expected --assume=T4,H100.")
    return found


def measure(
    model_in: Callable[[str], keras.Model],
    dataset: tf.data.Dataset,
    hardware: Mapping[str, Hardware],
    *,
    metric: str | None = None,
    margin: float = 0.01,
    alpha: float = 0.05,
    steps: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates a model as each device would compute it.

    A precision is tried on this machine: what is the same there are the
    numbers that it can hold, and not the order in which they are added.

    Args:
        model_in: gives the trained model, compiled, in a precision.
        dataset: to evaluate on.
        hardware: devices by name.
        metric: of the model's; None for an accuracy, or else the loss.
        margin: the largest difference of the metric that does not matter.
        alpha: the chance to call equal what differs by the margin.
        steps: batches to evaluate on at most.
        say: told of each precision.

    Returns:
        The record of a portability.json.
    """
    data = pieces.read(dataset, steps)
    model = model_in("float32")
    reference = pieces.outputs(pieces.of_model(model), data)
    has_metric = pieces.has_metric(model)
    expected = pieces.values(model, data, reference) if has_metric else {}
    name = choose_metric(expected, metric) if has_metric else None
    precisions = {
        device: recommend(found).precision for device, found in hardware.items()
    }
    results = {}
    for precision in dict.fromkeys(precisions.values()):
        say(f"evaluating in {precision}")
        same = precision == "float32"
        other = model if same else model_in(precision)
        found = pieces.outputs(pieces.of_model(other), data)
        both = None
        if name is not None:
            both = (pieces.values(model, data, found)[name], expected[name])
        results[precision] = _result(found, reference, both, margin, alpha)
    rows = [
        {"device": device, "precision": precision, **results[precision]}
        for device, precision in precisions.items()
    ]
    return {
        "schema": SCHEMA,
        "model": model.name,
        "metric": name,
        "margin": margin,
        "alpha": alpha,
        "examples": data.rows,
        "devices": rows,
        "passed": all(row["verdict"] == verdict.INSIDE for row in rows),
    }


def _result(found, reference, metrics, margin, alpha):
    seen = pieces.compared(found, reference)
    lost = _lost(found, reference)
    if metrics is None:
        # Without a metric the outputs themselves are judged.
        is_inside = seen.relative_difference <= margin
        judged = verdict.Verdict(
            None, None, None, verdict.INSIDE if is_inside else verdict.OUTSIDE
        )
    else:
        judged = verdict.judged(metrics[0], metrics[1], margin, alpha)
    row = judged.record()
    row["verdict"] = row.pop("word")
    reason = None
    if lost:
        row["verdict"] = verdict.OUTSIDE
        reason = f"{lost} outputs are not finite that are in float32"
    return row | {
        "largest_difference": seen.largest_difference,
        "relative_difference": seen.relative_difference,
        "same_choice": seen.same_choice,
        "not_finite": lost,
        "reason": reason,
    }


def _lost(found, reference) -> int:
    """Numbers that are not finite, and are in float32."""
    return sum(
        int(np.sum(np.isfinite(b) & ~np.isfinite(a)))
        for batch, expected in zip(found, reference, strict=True)
        for a, b in zip(batch, expected, strict=True)
        if np.issubdtype(b.dtype, np.floating) and a.shape == b.shape
    )
