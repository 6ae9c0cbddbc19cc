"""The comparison as a picture: the time of a step, a row a contestant."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.page import plots

_ROW_INCHES = 0.28
_HEAD_INCHES = 0.9


def step_times(record: Mapping[str, Any]) -> str:
    """An `<svg>` element: of each model a panel, of each precision a marker.

    Bars reach from the lowest to the highest round; the marker is the median.

    Args:
        record: what `compare.json` holds.
    """
    heights = []
    for model in record["models"]:
        names = _contestants(record, model)
        heights.append(_HEAD_INCHES + _ROW_INCHES * len(names))
    figure = plots.new_figure(plots.WIDE, sum(heights))
    for number, model in enumerate(record["models"]):
        axes = figure.add_subplot(len(heights), 1, number + 1)
        _panel(axes, record, model)
    labelled = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    # Beside the panels, where it hides no marker.
    figure.legend(
        labelled.values(),
        labelled,
        loc="outside lower right",
        ncols=len(labelled),
        frameon=False,
    )
    return plots.to_svg(figure)


def _panel(axes, record, model):
    names = _contestants(record, model)
    precisions = list(dict.fromkeys(r["precision"] for r in record["summary"]))
    for position, precision in enumerate(precisions):
        rows = [
            row
            for row in record["summary"]
            if row["model"] == model["name"] and row["precision"] == precision
        ]
        if not rows:
            continue
        spreads = [row["step_milliseconds"] for row in rows]
        medians = [each["median"] for each in spreads]
        # Precisions beside each other in the row of their contestant.
        offset = 0.2 * (position - (len(precisions) - 1) / 2)
        axes.errorbar(
            medians,
            [names.index(row["contestant"]) + offset for row in rows],
            xerr=[
                [s["median"] - s["lowest"] for s in spreads],
                [s["highest"] - s["median"] for s in spreads],
            ],
            fmt=plots.MARKERS[precision],
            color=plots.COLORS[precision],
            markersize=5,
            capsize=2,
            label=precision,
        )
    axes.set_yticks(range(len(names)), [plots.literal(each) for each in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds a step")
    title = model["title"] + (" (quick)" if record["quick"] else "")
    axes.set_title(title, loc="left", fontsize=10)


def _contestants(record, model):
    return list(
        dict.fromkeys(
            row["contestant"]
            for row in record["summary"]
            if row["model"] == model["name"]
        )
    )
