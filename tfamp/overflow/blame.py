"""What was at fault in a step that was not finite: the verdict, in words.

Pure logic on what replays of the step measured; `replay` measures.
"""

import dataclasses
import math
from collections.abc import Sequence

from tfamp.formats import FORMATS
from tfamp.overflow.first import Culprit, Pass, first_culprit

_AT_FAULT = {
    "data": "data",
    "weights": "weights",
    "forward": "forward",
    "losses": "loss",
    "backward": "backward",
    "gradients": "backward",
    "sums": "reduction",
}


@dataclasses.dataclass(frozen=True)
class Blame:
    """Who overflowed first.

    Attributes:
        at_fault: "data", "weights", "forward", "loss", "backward",
            "reduction" (only the sum over replicas), "scale" (without it all
            gradients are finite), or "unknown".
        message: the same in sentences.
        layer: the layer's path; None where it is no layer's fault.
        replica: the first one on which it was so, from 0; None where all are
            alike: their weights, and the sum of their gradients.
        worker: the replica's, from 0.
    """

    at_fault: str
    message: str
    layer: str | None = None
    replica: int | None = None
    worker: int | None = None


def verdict(
    seen: Pass,
    unscaled: Pass | None,
    in_float32: Pass | None,
    *,
    scale: float,
    workers: int = 1,
) -> Blame:
    """Says what was at fault.

    Args:
        seen: the step as it was.
        unscaled: at scale 1; None where that is how it was.
        in_float32: with every layer in float32, at scale 1; None where it
            computes in float32 anyway, or could not.
        scale: the loss scale of the step.
        workers: processes that train together, with as many replicas each.

    Raises:
        ValueError: where all of `seen` is finite.
    """
    culprit = first_culprit(seen)
    if culprit is None:
        raise ValueError("All is finite; there is nothing to blame.")
    at_fault = _AT_FAULT[culprit.stage]
    if at_fault in ("backward", "reduction") and unscaled is not None:
        # What overflows without the scale came first without it.
        without = first_culprit(unscaled)
        at_fault = "scale" if without is None else _AT_FAULT[without.stage]
        culprit = without or culprit
    if _takes_too_large_data(seen, culprit):
        at_fault = "data"
    replicas = len(seen.data.sizes)
    where = _where(culprit.replicas, replicas, workers)
    if at_fault == "data":
        text = f"The data are at fault: {_data(seen, culprit)}{where}."
    elif at_fault == "scale":
        text = (
            f"Only the scale is at fault: times {scale:g}, the first gradient "
            f"that is not finite is {_gradient(culprit)}{where}; at scale 1 "
            f"all are finite{_size_in_float32(in_float32, culprit)}."
        )
    else:
        what = {
            "weights": "The weights are at fault: "
            f"{culprit.point.name} holds inf or NaN already",
            "forward": "The forward pass is at fault: the first tensor that is "
            f"not finite is the {culprit.point.name} of layer "
            f"{culprit.point.layer}",
            "loss": "The loss is at fault: what the layers give is finite, the "
            "loss is not",
            "backward": "The backward pass is at fault: the first gradient "
            f"that is not finite is {_gradient(culprit)}",
            "reduction": "The sum over replicas is at fault: the gradient of "
            f"weight {culprit.point.name} is finite on each of them, but not "
            f"their sum in {culprit.point.dtype}",
        }[at_fault]
        if at_fault in ("forward", "loss", "backward"):
            what += where + _in_float32(in_float32, culprit)
        text = f"{what}."
    if at_fault in ("weights", "reduction"):
        return Blame(at_fault, text, culprit.point.layer)
    return Blame(
        at_fault,
        text,
        None if at_fault in ("data", "loss") else culprit.point.layer,
        replica=culprit.replicas[0],
        worker=culprit.replicas[0] * workers // replicas,
    )


def _takes_too_large_data(seen: Pass, culprit: Culprit) -> bool:
    """Whether finite data became inf where the first layer took them."""
    if culprit.stage != "forward" or culprit.point.name != "input":
        return False
    before = seen.forward.points[: culprit.position]
    return all(point.name == "input" for point in before) and _largest_data(
        seen
    )[1] > _limit(culprit.point.dtype)


def _largest_data(seen: Pass) -> tuple[str, float]:
    largest = seen.data.sizes.max(axis=0)
    index = int(largest.argmax())
    return seen.data.points[index].name, float(largest[index])


def _limit(dtype: str) -> float:
    """The largest number of a 16-bit format; inf for wider ones."""
    wide = dtype not in FORMATS or FORMATS[dtype].bits > 16
    return math.inf if wide else FORMATS[dtype].max


def _where(bad: Sequence[int], replicas: int, workers: int) -> str:
    if replicas == 1:
        return ""
    if len(bad) == replicas:
        return f" on all {replicas} replicas"
    names = f" on replica {', '.join(map(str, bad))}"
    if workers == 1:
        return names
    of = sorted({replica * workers // replicas for replica in bad})
    return f"{names} (worker {', '.join(map(str, of))})"


def _data(seen: Pass, culprit: Culprit) -> str:
    if culprit.stage != "data":
        name, largest = _largest_data(seen)
        dtype = culprit.point.dtype
        return (
            f"the {name} reach {largest:.3g}, beyond {dtype}'s "
            f"{_limit(dtype):g}, and are to be scaled down; they do so"
        )
    row = seen.rows[culprit.replicas[0], culprit.position]
    of_row = "" if row < 0 else f" in row {row} of the batch"
    return f"the {culprit.point.name} hold inf or NaN{of_row}"


def _gradient(culprit: Culprit) -> str:
    point = culprit.point
    if culprit.stage != "backward":
        return f"that of weight {point.name}"
    if point.name == "input":
        return f"the one that layer {point.layer} passes on to its input"
    return f"the one that arrives at the output of layer {point.layer}"


def _in_float32(in_float32: Pass | None, culprit: Culprit) -> str:
    """How float32 does in the same place: whose range it is, if any's."""
    if in_float32 is None:
        return ""
    if first_culprit(in_float32) is not None:
        return (
            ". In float32 it is not finite either: the model or its data are "
            "to blame, not the precision"
        )
    dtype, limit = culprit.point.dtype, _limit(culprit.point.dtype)
    if math.isinf(limit):
        return "; with all layers in float32 it is finite"
    largest = _largest(in_float32, culprit)
    text = f". That is {dtype}'s range: in float32 it reaches {largest:.3g}, "
    if largest > limit:
        text += f"beyond {dtype}'s {limit:g}"
    else:
        text += f"within {dtype}'s {limit:g}, so it overflows on the way there"
    if culprit.point.layer is None:
        return text
    return (
        f"{text}; keep the layer in float32: tfamp.keep_float32(model, "
        f"layers={culprit.point.layer!r})"
    )


def _size_in_float32(in_float32: Pass | None, culprit: Culprit) -> str:
    if in_float32 is None or first_culprit(in_float32) is not None:
        return ""
    largest = _largest(in_float32, culprit)
    return f", and in float32 this one is at most {largest:.3g}"


def _largest(seen: Pass, culprit: Culprit) -> float:
    """The largest magnitude at that point, over replicas."""
    return float(getattr(seen, culprit.stage).sizes[:, culprit.position].max())
