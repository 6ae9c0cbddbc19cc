"""Whether what was computed otherwise is as good, by parity's statistics."""

import dataclasses
from typing import Any

import numpy as np

from tfamp.analysis.parity.equivalence import lies_outside, paired_equivalence

INSIDE, OUTSIDE, OPEN = "inside", "outside", "not shown"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A metric beside that of the model in float32, on the same data.

    Attributes:
        metric: the mean over the pieces of the data.
        reference: likewise, in float32.
        interval: of the mean difference, at level 1 - 2 alpha; None where
            nothing differs, or one of them is no number.
        word: "inside" the margin, "outside", or "not shown" to be either.
    """

    metric: float | None
    reference: float | None
    interval: tuple[float, float] | None
    word: str

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


def judged(
    found: list[float], reference: list[float], margin: float, alpha: float
) -> Verdict:
    """Tests whether the mean of a metric is equivalent.

    Args:
        found: of each piece of the data.
        reference: of the same pieces in float32.
        margin: the largest difference that does not matter.
        alpha: the chance to call equal what differs by the margin.
    """
    means = [_mean(found), _mean(reference)]
    # No inference is needed where every piece is the same.
    if found == reference and None not in means:
        return Verdict(means[0], means[1], (0.0, 0.0), INSIDE)
    test = paired_equivalence(reference, found, margin=margin, alpha=alpha)
    word = OPEN
    if test.equivalent:
        word = INSIDE
    elif None in means or lies_outside(test, margin):
        word = OUTSIDE
    interval = test.confidence_interval
    if interval is None and test.mean_difference is not None:
        interval = (test.mean_difference,) * 2
    return Verdict(means[0], means[1], interval, word)


def _mean(values: list[float]) -> float | None:
    mean = float(np.mean(values))
    return mean if np.isfinite(mean) else None
