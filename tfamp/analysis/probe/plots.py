"""The plots of `tfamp probe`: histograms over powers of two, as Micikevicius
et al. (2018, "Mixed Precision Training", figure 3) draw them.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfamp.analysis.page import plots
from tfamp.analysis.page.part import Plot
from tfamp.errors import InputError
from tfamp.files.output import make_folder, output_folder
from tfamp.formats import FORMATS

Record = Mapping[str, Any]

GRADIENT_KINDS = ("activation_gradient", "gradient")
_KIND_NAMES = {
    "activation": "outputs",
    "activation_gradient": "gradients at outputs",
    "gradient": "gradients of weights",
}
_KIND_COLORS = {
    "activation": plots.MORE_COLORS[0],
    "activation_gradient": plots.COLORS["mixed_float16"],
    "gradient": plots.COLORS["mixed_bfloat16"],
}
# Names of more rows than this cannot be read in a heat map of any height.
_MAX_ROW_NAMES = 40
_PANELS = 12
_PANEL_COLUMNS = 3
_SUFFIXES = (".pdf", ".png", ".svg")


def gradients(record: Record) -> Plot:
    """All gradients over log2, with float16's range."""
    figure = plots.new_figure(plots.WIDE, 4.0)
    _draw_gradients(figure.subplots(), record)
    flushed, subnormal = _means(record)[0][:2]
    return plots.drawn(
        figure,
        "Values by power of two, of all layers: the gradients of weights, and "
        "those that arrive at layers' outputs, without loss scaling. Shaded "
        "is what float16 flushes to zero, in a lighter shade what it keeps as "
        "subnormals. The arrow is where the advised loss scale moves them.",
        f"Histogram; without scaling float16 flushes {flushed:.1%} of a "
        f"gradient tensor to zero on average, and keeps {subnormal:.1%} as "
        "subnormals.",
    )


def by_scale(record: Record) -> Plot:
    """What float16 loses of the gradients at each loss scale."""
    figure = plots.new_figure(plots.WIDE, 3.2)
    _draw_by_scale(figure.subplots(), record)
    scale = record["float16_scale"]
    best = f"it loses least at {scale:g}" if scale else "each scale overflows"
    return plots.drawn(
        figure,
        "What float16 makes of the gradients as a function of the loss scale: "
        "the mean over tensors, and the tensor that loses most. Where a tensor "
        "overflows, a step is lost.",
        f"Line chart; {best}.",
    )


def heat_map(record: Record, kind: str) -> Plot:
    """All layers over powers of two, for one kind of tensor."""
    tensors = _of_kinds(record, [kind])
    figure = plots.new_figure(plots.WIDE, 1.4 + min(0.14 * len(tensors), 9.0))
    _draw_heat_map(figure, figure.subplots(), tensors)
    return plots.drawn(
        figure,
        f"The {_KIND_NAMES[kind]} of every layer over powers of two, in the "
        "order of the forward pass. Left of the dashed line float16 keeps "
        "subnormals, left of the solid one zeros.",
        f"Heat map of {len(tensors)} tensors.",
        [label(tensor) for tensor in tensors],
    )


def panels(record: Record) -> Plot:
    """The tensors of which float16 loses most, a small histogram each."""
    tensors = worst_tensors(record)[:_PANELS]
    rows = math.ceil(len(tensors) / _PANEL_COLUMNS)
    figure = plots.new_figure(plots.WIDE, 0.4 + 1.4 * rows)
    columns = min(_PANEL_COLUMNS, len(tensors))
    grid = figure.subplots(
        rows, columns, sharex=True, sharey=True, squeeze=False
    )
    low, high = _exponent_range(tensors)
    for axes, tensor in zip(grid.flat, tensors, strict=False):
        _mark_float16(axes, 1.0, low, high)
        exponents = np.arange(low, high + 1)
        shares = _shares_by_exponent([tensor], low, high)
        color = _KIND_COLORS[tensor["kind"]]
        axes.bar(exponents + 0.5, shares, 1.0, color=color)
        # As wide as a panel is on a phone.
        lines = (tensor["layer"], tensor["name"])
        title = "\n".join(_shortened(line, 18) for line in lines if line)
        axes.set_title(plots.literal(title), fontsize=7, loc="left")
        axes.tick_params(labelsize=7)
        axes.set_xlim(low, high + 1)
    for axes in grid.flat[len(tensors) :]:
        axes.set_axis_off()
    figure.supxlabel("log2 of the value", fontsize=8)
    figure.supylabel("share of values", fontsize=8)
    names = ", ".join(label(tensor) for tensor in tensors[:3])
    return plots.drawn(
        figure,
        f"The {len(tensors)} gradient tensors of which float16 loses most "
        "without loss scaling, the worst first; shaded as above.",
        f"Small histograms; the first are {names}.",
    )


def save_overview(record: Record, path: str | os.PathLike) -> None:
    """Draws histogram, scales and layers into one file.

    Raises:
        InputError: for another suffix than .svg, .png or .pdf, a folder that
            cannot be written, or where matplotlib is missing.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"{path.name!r} is no picture; expected a name that ends in "
            f"{', '.join(_SUFFIXES)}."
        )
    tensors = _of_kinds(record, ["activation_gradient"])
    height = 1.4 + min(0.14 * len(tensors), 9.0)
    figure = plots.new_figure(plots.WIDE, 7.4 + height)
    top, middle, bottom = figure.subplots(
        3, 1, gridspec_kw={"height_ratios": [4.0, 3.4, height]}
    )
    _draw_gradients(top, record)
    _draw_by_scale(middle, record)
    _draw_heat_map(figure, bottom, tensors)
    make_folder(output_folder(path.parent))
    figure.savefig(path, dpi=150)


def worst_tensors(record: Record) -> list[Mapping[str, Any]]:
    """Gradients that float16 could hold, those that lose most at scale 1
    first.
    """

    def lost(tensor):
        losses = tensor["losses"]["float16"]
        return losses["zero"][0], losses["subnormal"][0]

    return sorted(in_16_bits(record), key=lost, reverse=True)


def in_16_bits(record: Record) -> list[Mapping[str, Any]]:
    """The gradients of layers that are not in float32 already."""
    return [
        tensor
        for tensor in _of_kinds(record, GRADIENT_KINDS)
        if not tensor["is_float32"]
    ]


def label(tensor: Mapping[str, Any]) -> str:
    """Such as `dense/kernel`; an output's gradient has the layer's path."""
    return "/".join(filter(None, [tensor["layer"], tensor["name"]]))


def _draw_gradients(axes, record):
    low, high = _exponent_range(_of_kinds(record, GRADIENT_KINDS))
    _mark_float16(axes, 1.0, low, high)
    exponents = np.arange(low, high + 1)
    for kind in GRADIENT_KINDS:
        shares = _shares_by_exponent(_of_kinds(record, [kind]), low, high)
        axes.stairs(
            shares,
            [*exponents, high + 1],
            color=_KIND_COLORS[kind],
            label=_KIND_NAMES[kind],
            fill=kind == "activation_gradient",
            alpha=0.6 if kind == "activation_gradient" else 1.0,
            lw=1.6,
        )
    top = axes.get_ylim()[1]
    scale = record["float16_scale"]
    if scale and scale > 1:
        shift = math.log2(scale)
        middle = (low + high) / 2
        begin = min(middle, high - shift)
        axes.annotate(
            "",
            (begin + shift, 1.06 * top),
            (begin, 1.06 * top),
            arrowprops={"arrowstyle": "->", "lw": 1.5},
        )
        axes.text(begin, 1.08 * top, f"loss scale 2^{shift:.0f}", fontsize=8)
    axes.set_ylim(0, 1.18 * top)
    axes.set_xlim(low, high + 1)
    axes.set_xlabel("log2 of the value")
    axes.set_ylabel("share of values")
    # Above: bars and the arrow have all the room there is below.
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0,
    )


def _draw_by_scale(axes, record):
    tensors = in_16_bits(record)
    exponents = [math.log2(scale) for scale in record["scales"]]
    mean = _means(record)
    zero = np.array([t["losses"]["float16"]["zero"] for t in tensors])
    overflow = np.array([t["losses"]["float16"]["overflow"] for t in tensors])
    lines = {
        "flushed, worst tensor": (zero.max(0), "#CC79A7", ":"),
        "flushed, mean": (mean[:, 0], plots.COLORS["mixed_float16"], "-"),
        "subnormal, mean": (mean[:, 1], plots.MORE_COLORS[2], "--"),
        "tensors that overflow": (
            (overflow > 0).mean(0),
            plots.COLORS["float32"],
            "-.",
        ),
    }
    for name, (values, color, style) in lines.items():
        axes.plot(exponents, values, color=color, ls=style, label=name)
    if record["float16_scale"]:
        best = math.log2(record["float16_scale"])
        axes.axvline(best, color="#555555", lw=1)
        axes.text(best, 1.02, f" best: 2^{best:.0f}", fontsize=8)
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("log2 of the loss scale")
    axes.set_ylabel("share")
    axes.legend(frameon=False, fontsize=8)


def _draw_heat_map(figure, axes, tensors):
    low, high = _exponent_range(tensors)
    shares = np.array([_shares_by_exponent([t], low, high) for t in tensors])
    picture = axes.imshow(
        np.where(shares > 0, np.log10(np.maximum(shares, 1e-12)), np.nan),
        aspect="auto",
        cmap="viridis",
        vmin=-5,
        vmax=0,
        interpolation="nearest",
        extent=(low, high + 1, len(tensors) - 0.5, -0.5),
    )
    float16 = FORMATS["float16"]
    axes.axvline(math.log2(float16.min_normal), color="#000000", ls="--", lw=1)
    axes.axvline(math.log2(float16.min_subnormal) - 1, color="#000000", lw=1)
    every = math.ceil(len(tensors) / _MAX_ROW_NAMES)
    rows = range(0, len(tensors), every)
    names = [plots.literal(_shortened(label(tensors[row]))) for row in rows]
    axes.set_yticks(rows, names, fontsize=6)
    axes.set_xlim(low, high + 1)
    axes.grid(False)
    axes.set_xlabel("log2 of the value")
    bar = figure.colorbar(picture, ax=axes, pad=0.02, fraction=0.04)
    bar.set_label("log10 of the share", fontsize=8)


def _mark_float16(axes, scale, low, high):
    """Shades what float16 cannot hold as a normal number, at that scale."""
    float16 = FORMATS["float16"]
    shift = math.log2(scale)
    zero = math.log2(float16.min_subnormal) - 1 - shift
    subnormal = math.log2(float16.min_normal) - shift
    overflow = math.log2(float16.max) - shift
    shade = {"color": "#000000", "lw": 0}
    axes.axvspan(min(low, zero), zero, alpha=0.16, **shade)
    axes.axvspan(zero, subnormal, alpha=0.07, **shade)
    axes.axvspan(overflow, max(high + 1, overflow), alpha=0.16, **shade)


def _of_kinds(record: Record, kinds: Sequence[str]):
    """Forward order: gradients come in that of the backward pass."""
    order: dict[str, int] = {}
    for tensor in record["tensors"]:
        order.setdefault(tensor["layer"], len(order))
    chosen = [t for t in record["tensors"] if t["kind"] in kinds]
    return sorted(chosen, key=lambda tensor: order[tensor["layer"]])


def _means(record) -> np.ndarray:
    """float64 [scales, 2]: shares flushed and subnormal, mean over tensors."""
    losses = [t["losses"]["float16"] for t in in_16_bits(record)]
    return np.mean([[e["zero"], e["subnormal"]] for e in losses], axis=0).T


def _exponent_range(tensors) -> tuple[int, int]:
    """What is held, and float16's own range within reach of it."""
    float16 = FORMATS["float16"]
    lows = [t["histogram"]["first_exponent"] for t in tensors]
    highs = [
        t["histogram"]["first_exponent"] + len(t["histogram"]["counts"]) - 1
        for t in tensors
    ]
    lowest = int(math.log2(float16.min_subnormal)) - 4
    return min([*lows, lowest]), max([*highs, 0])


def _shares_by_exponent(tensors, low: int, high: int) -> np.ndarray:
    counts = np.zeros(high - low + 1)
    for tensor in tensors:
        held = tensor["histogram"]["counts"]
        first = tensor["histogram"]["first_exponent"] - low
        counts[first : first + len(held)] += held
    return counts / max(counts.sum(), 1)


def _shortened(text: str, length: int = 32) -> str:
    return text if len(text) <= length else f"...{text[3 - length :]}"
