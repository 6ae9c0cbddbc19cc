"""How what a file computes differs from what the model computes."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Outputs beside others of the same inputs.

    Attributes:
        largest_difference: of any element; infinite where one of them is not
            finite, or where shapes differ.
        relative_difference: the largest, of any output, by the largest
            magnitude of that output, or by 1 where that is less.
        worst_output: the index of the output where that is.
        same_choice: the share of rows whose largest element is the same one;
            None where no output has a choice.
    """

    largest_difference: float
    relative_difference: float
    worst_output: int
    same_choice: float | None


def agreement(
    found: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> Agreement:
    """Compares flat lists of outputs.

    Not finite in both, in the same way, counts as the same.
    """
    largest, worst, relative = 0.0, 0, 0.0
    same = total = 0
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        difference, magnitude = _difference(a, b)
        largest = max(largest, difference)
        if difference / max(magnitude, 1.0) > relative:
            relative, worst = difference / max(magnitude, 1.0), i
        if a.shape == b.shape and _has_choice(b):
            same += int(np.sum(a.argmax(-1) == b.argmax(-1)))
            total += b[..., 0].size
    return Agreement(largest, relative, worst, same / total if total else None)


def joined(parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The outputs of several batches as those of one."""
    return [
        np.concatenate(each) if np.ndim(each[0]) else np.asarray(each)
        for each in zip(*parts, strict=True)
    ]


def _has_choice(array) -> bool:
    return (
        np.issubdtype(array.dtype, np.floating)
        and array.ndim > 1
        and array.shape[-1] > 1
        and array.size > 0
    )


def _difference(a, b) -> tuple[float, float]:
    if a.shape != b.shape:
        return float("inf"), 1.0
    if a.size == 0:
        return 0.0, 1.0
    if not np.issubdtype(b.dtype, np.number) and b.dtype != bool:
        return (0.0 if np.array_equal(a, b) else float("inf")), 1.0
    a, b = a.astype("float64"), b.astype("float64")
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(a - b))
    finite = np.abs(b[np.isfinite(b)])
    largest = float(np.max(gap)) if np.all(np.isfinite(gap)) else float("inf")
    return largest, float(finite.max()) if finite.size else 1.0
