"""Loss curves beside each other, as text and as a picture."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from tfamp.analysis.page import plots

_WIDTH = 60
_HEIGHT = 12


class Curve(NamedTuple):
    """The losses of one training.

    Attributes:
        name: what was trained.
        mark: one character that draws it.
        color: of matplotlib.
        losses: one per epoch; they may be NaN or inf.
    """

    name: str
    mark: str
    color: str
    losses: Sequence[float]


def as_text(curves: Sequence[Curve], loss: str) -> str:
    """A plot over epochs, logarithmic, the later curves under the earlier.

    What is not finite is drawn as "!" in a line above all numbers.

    Args:
        curves: of one length.
        loss: what is plotted.
    """
    logs = [[_log(value) for value in curve.losses] for curve in curves]
    finite = [x for row in logs for x in row if math.isfinite(x)] or [0.0]
    low, high = min(finite), max(finite)
    rows = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    not_finite = [" "] * _WIDTH
    for curve, log_losses in reversed(list(zip(curves, logs, strict=True))):
        for column, value in enumerate(_stretched(log_losses)):
            if math.isfinite(value):
                share = (value - low) / (high - low or 1.0)
                row = round((1.0 - share) * (_HEIGHT - 1))
                rows[row][column] = curve.mark
            else:
                not_finite[column] = "!"
    labels = {0: high, _HEIGHT // 2: (low + high) / 2, _HEIGHT - 1: low}
    lines = [
        f"{loss} by epoch: "
        + ", ".join(f"{curve.mark} {curve.name}" for curve in curves)
    ]
    if "!" in not_finite:
        lines.append(f"{'not finite':>10} |{''.join(not_finite)}")
    for row, cells in enumerate(rows):
        label = f"{math.exp(labels[row]):.3g}" if row in labels else ""
        lines.append(f"{label:>10} |{''.join(cells)}")
    epochs = len(curves[0].losses)
    lines.append(f"{'':>10} +{'-' * _WIDTH}")
    lines.append(f"{'epoch':>10}  1{epochs:>{_WIDTH - 1}}")
    return "\n".join(line.rstrip() for line in lines)


def as_svg(curves: Sequence[Curve], loss: str, title: str) -> str:
    """The same as an `<svg>` element; what is not finite is left out.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = plots.new_figure()
    axes = figure.subplots()
    for curve, style in zip(curves, ("-", "-", ":"), strict=False):
        losses = [x if math.isfinite(x) else math.nan for x in curve.losses]
        label = curve.name
        if not all(map(math.isfinite, curve.losses)):
            label += " (not finite where it is missing)"
        axes.plot(
            range(1, len(losses) + 1),
            losses,
            style,
            marker="o",
            markersize=3,
            color=curve.color,
            label=label,
        )
    axes.set(title=title, xlabel="epoch", ylabel=loss, yscale="log")
    axes.legend()
    return plots.to_svg(figure)


def _log(value: float) -> float:
    return math.log(value) if 0 < value < math.inf else math.nan


def _stretched(values: Sequence[float]) -> list[float]:
    """`_WIDTH` values, in straight lines between those that are given."""
    stretched = []
    for column in range(_WIDTH):
        place = column * (len(values) - 1) / (_WIDTH - 1)
        before = int(place)
        after = min(before + 1, len(values) - 1)
        share = place - before
        # 0 * NaN is NaN: a curve must not end before its last number.
        stretched.append(
            values[before]
            if share == 0
            else (1 - share) * values[before] + share * values[after]
        )
    return stretched
