"""The curves of several runs in one plot."""

import math
from collections.abc import Mapping

from tfamp.analysis.page import plots
from tfamp.analysis.page.part import Plot
from tfamp.analysis.report import run_plots
from tfamp.analysis.report.run_plots import Rows

_COLORS = (
    plots.COLORS["mixed_bfloat16"],
    plots.COLORS["mixed_float16"],
    plots.COLORS["float8"],
    plots.COLORS["float32"],
    *plots.MORE_COLORS,
)
_LINES = ("-", "--", ":", "-.")
# Inches, and what each line of the legend adds.
_HEIGHT, _LEGEND_LINE = 3.0, 0.25


def metric(runs: Mapping[str, Rows], name: str) -> Plot:
    """One figure of the logs by epoch, a line for each run.

    Args:
        runs: the epochs of each, by its name.
        name: of the figure.
    """
    legend = _LEGEND_LINE * math.ceil(len(runs) / 2)
    figure = plots.new_figure(plots.NARROW, _HEIGHT + legend)
    axes = figure.subplots()
    shown, ends = [], []
    for i, (run, epochs) in enumerate(runs.items()):
        values = run_plots.values_of(epochs, name)
        known = [value for value in values if math.isfinite(value)]
        if not known:
            continue
        axes.plot(
            [epoch["epoch"] + 1 for epoch in epochs],
            values,
            _LINES[i // len(_COLORS) % len(_LINES)],
            color=_COLORS[i % len(_COLORS)],
            marker="o" if len(epochs) <= run_plots.MARKED_EPOCHS else None,
            markersize=4,
            label=plots.literal(run),
        )
        shown += known
        ends.append(f"{known[-1]:.4g} in {run}")
    if shown and 0 < min(shown) * run_plots.WIDE_RANGE < max(shown):
        is_scale = name.startswith("loss_scale")
        axes.set_yscale("log", base=2 if is_scale else 10)
    axes.set_ylabel(plots.literal(name.replace("_", " ")))
    last = max(e["epoch"] + 1 for epochs in runs.values() for e in epochs)
    run_plots.count_on(axes, "epoch", [1, last])
    if shown:
        figure.legend(frameon=False, ncols=2, loc="outside upper left")
    return plots.drawn(
        figure,
        f"{name} by epoch, a line for each run.",
        f"Line chart of {name}; it ends at {', '.join(ends) or 'nothing'}.",
    )
