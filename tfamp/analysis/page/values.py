"""The numbers of a figure, for who hovers over it or saves them.

They are read off matplotlib's own artists, so that no plot has to say twice
what it draws.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

# What matplotlib calls an artist that was given no label.
_NO_LABEL = re.compile(r"_(child|container)\d+|_nolegend_")

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def boxes(figure: "Figure") -> list[list[float]]:
    """Where each panel lies, as it was saved last: left, top, width, height.

    In points from the upper left corner, which are the units of the SVG.
    """
    across, down = (72 * inches for inches in figure.get_size_inches())
    found = []
    for axes in _panels(figure):
        place = axes.get_position()
        left, top = place.x0 * across, (1 - place.y1) * down
        shape = (place.width * across, place.height * down)
        found.append([round(float(n), 2) for n in (left, top, *shape)])
    return found


def panels(figure: "Figure", rows: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What each panel shows.

    Args:
        figure: after it was saved.
        rows: what the rows of a heat map are.

    Returns:
        Each `title`, `x` and `y` (axes: `label`, `low`, `high`, `is_log`,
        `names` by position), and `series`: `label`, `x`, `y`; of a heat map a
        row each, with its place as `at` and its numbers as `y`.
    """
    return [
        {
            "title": _plain(axes.get_title("left") or axes.get_title()),
            "x": _axis(axes.xaxis, axes.get_xlim(), axes.get_xscale()),
            "y": _axis(axes.yaxis, axes.get_ylim(), axes.get_yscale()),
            "series": [
                *_lines(axes),
                *_bars(axes),
                *_stairs(axes),
                *_points(axes),
                *_images(axes, rows),
            ],
        }
        for axes in _panels(figure)
    ]


def _panels(figure):
    # A color bar is no panel: it names no numbers of its own.
    return [
        axes
        for axes in figure.axes
        if axes.axison and axes.get_label() != "<colorbar>"
    ]


def _axis(axis, limits, scale):
    from matplotlib.ticker import FixedLocator, ScalarFormatter

    found = {
        "label": _plain(axis.get_label_text()),
        "low": _number(limits[0]),
        "high": _number(limits[1]),
        "is_log": scale == "log",
    }
    # Names stand at places of their own; numbers are written anywhere.
    has_names = isinstance(axis.get_major_locator(), FixedLocator)
    if has_names and not isinstance(
        axis.get_major_formatter(), ScalarFormatter
    ):
        names = (_plain(label.get_text()) for label in axis.get_ticklabels())
        places = map(_number, axis.get_majorticklocs())
        found["names"] = [*zip(places, names, strict=False)]
    return found


def _lines(axes):
    for line in axes.lines:
        # Others, such as a limit from side to side, are no data.
        if line.get_transform() == axes.transData and len(line.get_xdata()):
            yield _series(
                line.get_label(),
                line.get_xdata(orig=False),
                line.get_ydata(orig=False),
            )


def _bars(axes):
    from matplotlib.container import BarContainer

    for bars in axes.containers:
        if not isinstance(bars, BarContainer):
            continue
        xs, ys = [], []
        for bar in bars.patches:
            x, y = bar.get_x(), bar.get_y()
            if bars.orientation == "horizontal":
                xs.append(x + bar.get_width())
                ys.append(y + bar.get_height() / 2)
            else:
                xs.append(x + bar.get_width() / 2)
                ys.append(y + bar.get_height())
        yield _series(bars.get_label(), xs, ys)


def _stairs(axes):
    from matplotlib.patches import StepPatch

    for patch in axes.patches:
        if isinstance(patch, StepPatch):
            values, edges, _ = patch.get_data()
            middles = (edges[1:] + edges[:-1]) / 2
            yield _series(patch.get_label(), middles, values)


def _points(axes):
    from matplotlib.collections import PathCollection

    for points in axes.collections:
        if not isinstance(points, PathCollection):
            continue
        # What is not finite is masked, and would take its x with it.
        places: np.ndarray = np.ma.getdata(np.ma.asarray(points.get_offsets()))
        if len(places):
            xs, ys = places.T
            yield _series(points.get_label(), xs, ys)


def _images(axes, rows):
    for image in axes.images:
        left, right, *_ = image.get_extent()
        values = image.get_array().filled(math.nan)
        width = (right - left) / values.shape[1]
        xs = [left + width * (i + 0.5) for i in range(values.shape[1])]
        for i, row in enumerate(values):
            name = rows[i] if i < len(rows) else f"row {i + 1}"
            yield {**_series(name, xs, row), "at": i}


def _series(label, xs, ys):
    # matplotlib leaves out of legends what begins with a dash below.
    label = "" if _NO_LABEL.fullmatch(label) else label.removeprefix("_")
    return {
        "label": _plain(label),
        "x": [*map(_number, xs)],
        "y": [*map(_number, ys)],
    }


def _number(value):
    value = float(value)
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _plain(text):
    return text.replace(r"\$", "$")
