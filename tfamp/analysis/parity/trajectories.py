"""How two runs of one seed part: the losses of their steps beside each other.

Both start from the same weights and see the same batches. So their losses
agree to the rounding of a forward pass until the updates have differed by
enough. The rule: the runs part at the first step at which

    |loss - reference| > epsilon * max(|loss|, |reference|)

where epsilon is the spacing of the compute format from 1 to 2, 2**-7 for
bfloat16 and 2**-10 for float16 (for two runs in float32: 2**-23). A step
without a finite loss in one run alone parts them too.

Nothing here knows Keras or files.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tfamp.formats import FORMATS
from tfamp.precision.policy import (
    FLOAT8,
    compute_dtype_of,
    resolve_precision,
)

# Step (from 1) -> its loss; None where the loss was not finite.
Losses = Mapping[int, float | None]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where the losses of a run leave those of the reference.

    Attributes:
        epsilon: what counts as rounding, relative.
        first_step: that differs by more, from 1; None if none does.
        at_first_step: the relative difference at the first step, where the
            weights are the same: rounding alone. None where it is unknown.
        steps: all that both runs have.
        relative_differences: of these steps; NaN where one is not finite.
    """

    epsilon: float
    first_step: int | None
    at_first_step: float | None
    steps: Sequence[int]
    relative_differences: Sequence[float]


def epsilon_of(precision: str) -> float:
    """The spacing from 1 to 2 of what a precision, or a map, computes in."""
    precision = resolve_precision(precision)
    if precision == FLOAT8:
        return FORMATS["float8_e4m3fn"].epsilon
    return FORMATS[compute_dtype_of(precision)].epsilon


def compare(reference: Losses, other: Losses, epsilon: float) -> Divergence:
    """Compares the losses of two runs step by step.

    Args:
        reference: of the run to compare with.
        other: of the run in question.
        epsilon: relative difference that counts as rounding.
    """
    steps = [step for step in reference if step in other]
    a = np.array([reference[step] for step in steps], np.float64)
    b = np.array([other[step] for step in steps], np.float64)
    size = np.maximum(np.abs(a), np.abs(b))
    # Two zeros agree, and divide by nothing.
    relative = np.abs(a - b) / np.where(size == 0, 1.0, size)
    parted = (relative > epsilon) | (np.isfinite(a) != np.isfinite(b))
    first = int(np.argmax(parted)) if np.any(parted) else None
    knows_first = steps[:1] == [1] and np.isfinite(relative[0])
    return Divergence(
        epsilon=epsilon,
        first_step=None if first is None else steps[first],
        at_first_step=float(relative[0]) if knows_first else None,
        steps=steps,
        relative_differences=relative.tolist(),
    )


def thin(
    steps: Sequence[int], values: Sequence[float | None], most: int
) -> tuple[list[int], list[float | None]]:
    """At most so many points of a curve: the means of equal stretches.

    Args:
        steps: in ascending order.
        values: one for each step; None or NaN where there is none.
        most: the number of points.

    Returns:
        The last step and the mean of each stretch; None where it has no
        value.
    """
    array = np.array(values, np.float64)
    points_steps, points = [], []
    for stretch in np.array_split(
        np.arange(len(steps)), max(min(most, len(steps)), 1)
    ):
        if len(stretch):
            known = array[stretch][np.isfinite(array[stretch])]
            points_steps.append(int(steps[stretch[-1]]))
            points.append(float(np.mean(known)) if len(known) else None)
    return points_steps, points
