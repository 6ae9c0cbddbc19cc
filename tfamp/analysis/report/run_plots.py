"""The plots of a training run: metrics, loss scale, speed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tfamp.analysis.page import plots
from tfamp.analysis.page.part import Plot
from tfamp.analysis.report.run_logs import is_skip

Rows = Sequence[Mapping[str, Any]]

_HEIGHT = 2.8
_LINES = ("-", "--", ":", "-.")
_OVERFLOW_COLOR = plots.COLORS["mixed_float16"]
_GROWTH_COLOR = plots.MORE_COLORS[0]

# A longer curve needs no dots to be seen.
MARKED_EPOCHS = 40

# From this ratio on, an axis shows powers of ten.
WIDE_RANGE = 100


def metric(epochs: Rows, name: str, precision: str) -> Plot:
    """One metric by epoch, in training and in evaluation."""
    curves = {
        label: values
        for label, values in (
            ("evaluation", values_of(epochs, f"val_{name}")),
            ("training", values_of(epochs, name)),
        )
        if any(map(math.isfinite, values))
    }
    figure = plots.new_figure(plots.NARROW, _HEIGHT)
    axes = figure.subplots()
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    for (label, values), line in zip(curves.items(), _LINES, strict=False):
        axes.plot(
            numbers,
            values,
            line,
            color=_color(precision),
            marker="o" if len(epochs) <= MARKED_EPOCHS else None,
            markersize=4,
            label=label,
        )
    count_on(axes, "epoch", numbers)
    axes.set_ylabel(plots.literal(name))
    shown = [v for values in curves.values() for v in values if v == v]
    if shown and 0 < min(shown) * WIDE_RANGE < max(shown):
        axes.set_yscale("log")
    if curves:
        axes.legend(frameon=False)
    ends = " and ".join(
        f"{_last(values):.4g} in {label}" for label, values in curves.items()
    )
    return plots.drawn(
        figure,
        f"{name} by epoch, in {' and '.join(curves) or 'no case finite'}.",
        f"Line chart of {name} over {len(epochs)} epochs; it ends at "
        f"{ends or 'no finite value'}.",
    )


def scale_timeline(changes: Rows) -> Plot:
    """The loss scale by step, with the steps that were skipped.

    Args:
        changes: of `scale.jsonl`.
    """
    figure = plots.new_figure(plots.WIDE, _HEIGHT)
    axes = figure.subplots()
    names = sorted({change.get("optimizer") or "" for change in changes})
    for i, name in enumerate(names):
        rows = [c for c in changes if (c.get("optimizer") or "") == name]
        axes.step(
            [row["step"] for row in rows],
            [row["scale"] for row in rows],
            where="post",
            color=plots.COLORS["float32"],
            linestyle=_LINES[i % len(_LINES)],
            label=plots.literal(name or "loss scale"),
        )
    skips = [row for row in changes if is_skip(row)]
    growths = [row for row in changes if row["reason"] == "growth"]
    for label, marker, color, rows in (
        ("skipped step", "x", _OVERFLOW_COLOR, skips),
        ("growth", "^", _GROWTH_COLOR, growths),
    ):
        if rows:
            axes.scatter(
                [row["step"] for row in rows],
                [row["scale"] for row in rows],
                s=28,
                marker=marker,
                color=color,
                zorder=3,
                label=label,
            )
    axes.set_yscale("log", base=2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss scale")
    figure.legend(frameon=False, ncols=4, loc="outside upper left")
    return plots.drawn(
        figure,
        "The loss scale by step. A cross is a step whose gradients were not "
        "finite: it changed no weight.",
        f"Step chart of the loss scale with {len(skips)} skipped steps; it "
        f"ends at {power_of_two(changes[-1]['scale'])}.",
    )


def scale_by_epoch(epochs: Rows) -> Plot:
    """The loss scale and the skipped steps of each epoch."""
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    scales = columns(epochs, "loss_scale")
    figure = plots.new_figure(plots.NARROW, _HEIGHT)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for i, name in enumerate(scales):
        upper.step(
            numbers,
            values_of(epochs, name),
            where="mid",
            color=plots.COLORS["float32"],
            linestyle=_LINES[i % len(_LINES)],
            label=plots.literal(name),
        )
    upper.set_yscale("log", base=2)
    upper.set_ylabel("loss scale")
    if len(scales) > 1:
        upper.legend(frameon=False)
    skipped = [
        sum(epoch.get(name) or 0 for name in columns(epochs, "skipped_steps"))
        for epoch in epochs
    ]
    lower.bar(numbers, skipped, color=_OVERFLOW_COLOR)
    lower.set_ylabel("skipped")
    lower.set_ylim(0, max(1, *skipped) * 1.1)
    lower.yaxis.get_major_locator().set_params(integer=True)
    count_on(lower, "epoch", numbers)
    ends = ", ".join(power_of_two(_last(values_of(epochs, n))) for n in scales)
    return plots.drawn(
        figure,
        "The loss scale at the end of each epoch, and the steps that it "
        "skipped.",
        f"Step chart of the loss scale, which ends at {ends}, over bars of "
        f"skipped steps, {sum(skipped):.0f} in all.",
    )


def learning_rate(epochs: Rows) -> Plot:
    """The learning rate that each epoch ended with."""
    values = values_of(epochs, "learning_rate")
    figure = plots.new_figure(plots.NARROW, _HEIGHT)
    axes = figure.subplots()
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    axes.plot(
        numbers,
        values,
        color=plots.COLORS["float32"],
        marker="o" if len(epochs) <= MARKED_EPOCHS else None,
        markersize=4,
    )
    axes.set_ylim(0, 1.1 * (max(v for v in [0, *values] if v == v) or 1))
    axes.set_ylabel("learning rate")
    count_on(axes, "epoch", numbers)
    return plots.drawn(
        figure,
        "The learning rate at the end of each epoch.",
        f"Line chart of the learning rate; it ends at {_last(values):.4g}.",
    )


def throughput(epochs: Rows, precision: str) -> Plot:
    """Examples per second in each epoch."""
    values = values_of(epochs, "examples_per_second")
    figure = plots.new_figure(plots.NARROW, _HEIGHT)
    axes = figure.subplots()
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    axes.plot(
        numbers,
        values,
        color=_color(precision),
        marker="o" if len(epochs) <= MARKED_EPOCHS else None,
        markersize=4,
    )
    axes.set_ylim(0, 1.1 * (max(v for v in [0, *values] if v == v) or 1))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("examples/s")
    count_on(axes, "epoch", numbers)
    return plots.drawn(
        figure,
        "Throughput by epoch; the first one may hold the compilation.",
        f"Line chart of examples per second; {_last(values):,.0f} in the last "
        "epoch.",
    )


def power_of_two(scale: float) -> str:
    """`2^16`, or the number where it is no power of two."""
    exponent = math.log2(scale) if scale > 0 else math.nan
    return f"2^{exponent:.0f}" if exponent.is_integer() else f"{scale:.6g}"


def columns(epochs: Rows, start: str) -> list[str]:
    """The names of logs that begin so; a model of two optimizers has two."""
    return sorted({n for epoch in epochs for n in epoch if n.startswith(start)})


def values_of(epochs: Rows, name: str) -> list[float]:
    """A column; NaN where it is absent or was not finite."""
    return [
        math.nan if epoch.get(name) is None else float(epoch[name])
        for epoch in epochs
    ]


def _last(values):
    return next((v for v in reversed(values) if v == v), math.nan)


def count_on(axes, label, numbers):
    """An axis of whole numbers that shows all of these."""
    axes.set_xlabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)


def _color(precision):
    return plots.COLORS.get(precision, plots.COLORS["float32"])
