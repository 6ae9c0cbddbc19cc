"""Whether two treatments of the same seeds give the same result on average.

The two one-sided tests of Schuirmann (1987, "A comparison of the two one-sided
tests procedure and the power approach for assessing the equivalence of average
bioavailability"), paired by seed. A usual t-test cannot show equality: what it
does not find may be there. Here the burden is turned round: equivalence is
shown when both "the mean difference is -margin or less" and "it is +margin or
more" are rejected at level alpha, which is the same as the confidence interval
at level 1 - 2 alpha lying within the margin.

Nothing here knows Keras or files.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from tfamp.errors import InputError
from tfamp.formats import FORMATS

# More seeds than anyone would train.
_MOST_SEEDS = 100

# Metrics are float32: what differs by less than its rounding does not differ.
_ROUNDING = FORMATS["float32"].epsilon

Method = Literal["identical", "t-test", "sign test", "none"]


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """What the differences of paired results say.

    Attributes:
        equivalent: whether equivalence is shown.
        method: "t-test"; "sign test", of the median, where all differences
            are the same and a t-test has no spread to work with; "identical",
            where the runs were, so that there is nothing to infer; "none"
            where nothing can be shown: one pair, or a result that is no
            number.
        pairs: how many there are.
        mean_difference: other less reference; None where one is no number.
        standard_deviation: of the differences, with n - 1; None for one pair.
        p_value: the larger of both tests; None without a test.
        confidence_interval: of the mean difference, at level 1 - 2 alpha;
            None without a t-test.
    """

    equivalent: bool
    method: Method
    pairs: int
    mean_difference: float | None = None
    standard_deviation: float | None = None
    p_value: float | None = None
    confidence_interval: tuple[float, float] | None = None


def require_scipy() -> None:
    """Says how to install scipy where it is missing.

    Raises:
        InputError: scipy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise InputError(
            "The equivalence test needs scipy: pip install 'tfamp[report]'."
        )


def paired_equivalence(
    reference: Sequence[float],
    other: Sequence[float],
    *,
    margin: float,
    alpha: float = 0.05,
    identical: bool = False,
) -> Equivalence:
    """Tests whether paired results are equivalent.

    Args:
        reference: a result for each seed.
        other: the results of the same seeds.
        margin: the largest mean difference that does not matter, in the unit
            of the results.
        alpha: the chance to call equivalent what differs by the margin.
        identical: the runs are known to be the same computation, not only to
            end in the same number.

    Raises:
        InputError: for a margin that is not positive and finite, or an alpha
            that is not between 0 and 0.5.
    """
    check_test(margin, alpha)
    pairs = len(reference)
    # In float64: float32 would round the differences once more.
    differences = np.subtract(other, reference, dtype=np.float64)
    if not np.all(np.isfinite(differences)) or not pairs:
        return Equivalence(False, "none", pairs)
    mean = float(np.mean(differences))
    if pairs == 1:
        return Equivalence(False, "none", pairs, mean)
    deviation = float(np.std(differences, ddof=1))
    if identical and not np.any(differences):
        return Equivalence(True, "identical", pairs, 0.0, 0.0, 0.0, (0.0, 0.0))
    rounding = _ROUNDING * float(np.max(np.abs([*reference, *other])))
    if np.ptp(differences) <= rounding:
        p_value = sign_test(differences, margin)
        return Equivalence(
            p_value < alpha, "sign test", pairs, mean, deviation, p_value
        )
    p_value = float(two_one_sided_tests(differences, margin))
    return Equivalence(
        p_value < alpha,
        "t-test",
        pairs,
        mean,
        deviation,
        p_value,
        _confidence_interval(differences, 1 - 2 * alpha),
    )


def lies_outside(found: Equivalence, margin: float) -> bool:
    """Whether the results were shown to differ by more than the margin."""
    if found.mean_difference is None or found.pairs < 2:
        return False
    low, high = found.confidence_interval or (found.mean_difference,) * 2
    return low >= margin or high <= -margin


def seeds_needed(
    found: Equivalence, *, margin: float, alpha: float = 0.05
) -> int | None:
    """How many seeds would show it, were they as those that there are.

    Args:
        found: what the seeds so far say; neither equivalent nor different.
        margin: as in `paired_equivalence`.
        alpha: as in `paired_equivalence`.

    Returns:
        The number of all seeds; None where the difference is as large as the
        margin, or where a hundred would not do. With one seed, 5.
    """
    from scipy import stats

    if found.pairs == 1:
        return 5
    if found.mean_difference is None or found.standard_deviation is None:
        return None
    room = margin - abs(found.mean_difference)
    if room <= 0:
        return None
    for seeds in range(found.pairs + 1, _MOST_SEEDS + 1):
        if found.method == "sign test":
            is_enough = 0.5**seeds < alpha
        else:
            error = found.standard_deviation / math.sqrt(seeds)
            is_enough = error * stats.t.ppf(1 - alpha, seeds - 1) < room
        if is_enough:
            return seeds
    return None


def two_one_sided_tests(differences: np.ndarray, margin: float) -> np.ndarray:
    """The p-values of the paired tests, over the last axis.

    Args:
        differences: float64 `[..., pairs]`, with some spread in each row.
        margin: as in `paired_equivalence`.

    Returns:
        float64 `[...]`: the larger p-value of both tests.
    """
    from scipy import stats

    above = stats.ttest_1samp(
        differences, -margin, axis=-1, alternative="greater"
    )
    below = stats.ttest_1samp(differences, margin, axis=-1, alternative="less")
    return np.maximum(above.pvalue, below.pvalue)


def sign_test(differences: np.ndarray, margin: float) -> float:
    """The p-value of two one-sided tests of the median, which need no spread.

    Args:
        differences: float64 `[pairs]`.
        margin: as in `paired_equivalence`.
    """
    from scipy import stats

    pairs = len(differences)
    inside = (np.sum(differences > -margin), np.sum(differences < margin))
    return max(
        float(stats.binomtest(int(n), pairs, alternative="greater").pvalue)
        for n in inside
    )


def check_test(margin: float, alpha: float) -> None:
    """Checks the settings of a test.

    Raises:
        InputError: as `paired_equivalence` does.
    """
    if not 0 < margin < math.inf:
        raise InputError(
            f"margin={margin} must be a positive number, in the unit of the "
            "metric: 0.01 is one point of accuracy."
        )
    if not 0 < alpha < 0.5:
        raise InputError(
            f"alpha={alpha} must lie between 0 and 0.5; 0.05 is usual."
        )


def _confidence_interval(differences, level):
    from scipy import stats

    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(level)
    return float(interval.low), float(interval.high)
