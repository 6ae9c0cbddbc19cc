"""The look of all plots: sizes, colours, and SVG out of matplotlib.

The colours are those of Okabe and Ito (2008), told apart with every kind of
colour vision. A precision has the same one in every plot.
"""

import io
from typing import TYPE_CHECKING

from tfamp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "float32": "#000000",
    "mixed_bfloat16": "#0072B2",
    "mixed_float16": "#D55E00",
}
MORE_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")

_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.alpha": 0.3,
    # Text stays text: it can be read aloud, searched and copied.
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


def new_figure(width: float = 7.0, height: float = 4.0) -> "Figure":
    """An empty figure in the style of reports; sizes in inches.

    It has no window and no global state: `pyplot` is not used.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        return Figure(figsize=(width, height))


def to_svg(figure: "Figure") -> str:
    """The figure as an `<svg>` element that scales with the page."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
