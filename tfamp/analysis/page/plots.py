"""The look of all plots: sizes, colours, and SVG out of matplotlib.

The colours are those of Okabe and Ito (2008), told apart with every kind of
colour vision. A precision has the same colour and marker in every plot.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tfamp.analysis.page import values
from tfamp.analysis.page.part import Plot
from tfamp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "float32": "#000000",
    "mixed_bfloat16": "#0072B2",
    "mixed_float16": "#D55E00",
    "float8": "#009E73",
}
MARKERS = {
    "float32": "o",
    "mixed_bfloat16": "s",
    "mixed_float16": "^",
    "float8": "D",
}
MORE_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#F0E442")

# Inches. Two narrow plots stand side by side on a wide screen.
WIDE = 7.0
NARROW = 4.5
# On a phone of 380 pixels, with letters of the size they have elsewhere.
_PHONE = 3.4
# Letters of which two columns of a legend, and many ticks, fit there.
_PHONE_LABEL = 15
_PHONE_TICK = 5

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    # Grid lines behind bars and curves, not through them.
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    # Text stays text: it can be searched and copied.
    "svg.fonttype": "none",
    # Equal input gives equal files.
    "svg.hashsalt": "tfamp",
}


def require_matplotlib() -> None:
    """Says how to install matplotlib where it is missing.

    A command that will plot calls this before it begins to measure.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(
            "Plots need matplotlib: pip install 'tfamp[report]'."
        ) from None


def new_figure(width: float = WIDE, height: float = 4.0) -> "Figure":
    """An empty figure in the style of reports; sizes in inches.

    It has no window and no global state: `pyplot` is not used.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
    # Axes read the settings when they are made, which is after this returns.
    vars(figure)["add_subplot"] = matplotlib.rc_context(_STYLE)(
        figure.add_subplot
    )
    return figure


def literal(text: str) -> str:
    """A name that matplotlib shows as it is, also with `$` in it."""
    return text.replace("$", r"\$")


def drawn(
    figure: "Figure",
    caption: str,
    alternative: str,
    rows: Sequence[str] = (),
) -> Plot:
    """The figure as a plot of a report, with its numbers.

    A wide figure is drawn for a phone too.

    Args:
        figure: done; it is not to be used after.
        caption: as of `Plot`.
        alternative: as of `Plot`.
        rows: what the rows of a heat map are.
    """
    svg = to_svg(figure)
    shown = {
        "panels": values.panels(figure, rows),
        "boxes": values.boxes(figure),
    }
    narrow = ""
    width, height = figure.get_size_inches()
    if width > NARROW:
        _fit_phone(figure)
        figure.set_size_inches(_PHONE, height)
        narrow = to_svg(figure)
        shown["narrow_boxes"] = values.boxes(figure)
    return Plot(svg, caption, alternative, narrow, shown)


def _fit_phone(figure: "Figure") -> None:
    """Fewer columns of a legend, and fewer ticks, than a wide figure has."""
    from matplotlib.ticker import MaxNLocator

    # A legend does not rearrange itself.
    for legend in tuple(figure.legends):
        labels = [text.get_text() for text in legend.get_texts()]
        legend.remove()
        figure.legend(
            [each for each in legend.legend_handles if each is not None],
            labels,
            frameon=False,
            ncols=2 if max(map(len, labels)) <= _PHONE_LABEL else 1,
            loc="outside upper left",
        )
    for axes in figure.axes:
        locator = axes.xaxis.get_major_locator()
        longest = max(
            (len(t.get_text()) for t in axes.get_xticklabels()), default=0
        )
        if isinstance(locator, MaxNLocator) and longest > _PHONE_TICK:
            locator.set_params(nbins=3)


def to_svg(figure: "Figure") -> str:
    """The figure as an `<svg>` element that scales with the page."""
    import matplotlib
    from matplotlib.collections import QuadMesh

    for axes in figure.axes:
        if axes.images or any(
            isinstance(each, QuadMesh) for each in axes.collections
        ):
            axes.grid(False)
    text = io.StringIO()
    # None leaves out a field: the file names no program, day or address.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata=metadata)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
