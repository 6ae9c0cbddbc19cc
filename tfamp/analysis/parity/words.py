"""The verdict of `tfamp parity` in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from tfamp.analysis.parity.equivalence import Equivalence, lies_outside

_REFERENCE = "float32"


def verdict(
    precision: str,
    found: Equivalence,
    *,
    metric: str | None,
    greater_is_better: bool | None,
    margin: float,
    alpha: float,
    failures: Sequence[Mapping[str, Any]],
    more_seeds: int | None = None,
) -> str:
    """What the test of one precision says, in one or two sentences.

    Args:
        precision: that is compared with float32.
        found: the test's outcome.
        metric: that is judged.
        greater_is_better: whether more of it is better.
        margin: of the test.
        alpha: of the test.
        failures: runs without the metric, of both precisions, as in
            `parity.json`.
        more_seeds: that would decide it, all in all; None where no number of
            them would.
    """
    if failures:
        return _because_of(failures, precision)
    if found.pairs < 2:
        return (
            f"{precision}: undecided. One seed proves nothing: at least 2 are "
            "needed, and 5 are better."
        )
    seeds = f"{found.pairs} seeds"
    if found.method == "identical":
        return (
            f"{precision} is equivalent to {_REFERENCE}: the runs are "
            f"identical, step by step, for each of {seeds}."
        )
    figures = _figures(metric, found, seeds, alpha)
    if found.equivalent:
        return (
            f"{precision} is equivalent to {_REFERENCE}: {figures}, within "
            f"the margin of {margin:g}."
        )
    difference = found.mean_difference
    if difference is not None and lies_outside(found, margin):
        is_better = (difference > 0) == greater_is_better
        return (
            f"{precision} is {'better' if is_better else 'worse'} than "
            f"{_REFERENCE}: {figures}, beyond the margin of {margin:g}."
        )
    advice = (
        f"With {more_seeds} seeds like these it would be shown: --seeds="
        f"{more_seeds} goes on from here."
        if more_seeds
        else "More seeds like these would not show it."
    )
    coarse = (
        " So would a metric that is less coarse."
        if found.method == "sign test" and more_seeds
        else ""
    )
    return (
        f"{precision}: undecided, {figures}, and the margin is {margin:g}. "
        f"{advice}{coarse}"
    )


def sentences(
    tests: Sequence[Mapping[str, Any]],
    metric: str | None,
    margin: float,
    reference_mean: float | None,
) -> list[str]:
    """The verdicts of all precisions, the bad news first.

    Args:
        tests: of `parity.json`.
        metric: that is judged.
        margin: of the tests.
        reference_mean: of the metric in float32.
    """
    ordered = sorted(tests, key=lambda test: test["equivalent"])
    found = [test["verdict"] for test in ordered]
    if reference_mean is not None and 0 < abs(reference_mean) < 2 * margin:
        found.append(
            f"Mind the margin: {margin:g} is much, where {metric} is "
            f"{reference_mean:.2g} in float32."
        )
    return found


def _because_of(failures, precision):
    run, *others = sorted(failures, key=lambda r: r["precision"] != _REFERENCE)
    more = f" (and {len(others)} more)" if others else ""
    who = (
        f"{_REFERENCE} itself"
        if run["precision"] == _REFERENCE
        else run["precision"]
    )
    return (
        f"{precision} is not equivalent to {_REFERENCE}: {who} "
        f"{run['status']} with seed {run['seed']}{more}: "
        f"{run['reason'].rstrip('.')}."
    )


def _figures(metric, found, seeds, alpha):
    text = f"{metric} differs by {_signed(found.mean_difference)}"
    if found.method == "sign test":
        return (
            f"{text} for each of {seeds} (sign test, p = {found.p_value:.2g})"
        )
    low, high = found.confidence_interval
    return (
        f"{text} on average over {seeds} ({1 - 2 * alpha:.0%} confidence "
        f"interval {_signed(low)} to {_signed(high)}; p = {found.p_value:.2g})"
    )


def _signed(value):
    return f"{value:+.4g}" if value else "0"
