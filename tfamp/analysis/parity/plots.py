"""The plots of `tfamp parity`."""

import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

from tfamp.analysis.page import plots
from tfamp.analysis.page.part import Plot

_HEIGHT = 3.2
_NOISE_COLOR = "#999999"

# Runs that agree lie on each other: a broad pale line shows through the others.
_LINES: dict[str, dict[str, Any]] = {
    "float32": {"ls": "-", "lw": 4.0, "alpha": 0.3},
    "mixed_bfloat16": {"ls": "-", "lw": 0.9, "alpha": 0.8},
    "mixed_float16": {"ls": (0, (2, 2)), "lw": 0.9, "alpha": 0.8},
    "float8": {"ls": (0, (4, 1, 1, 1)), "lw": 0.9, "alpha": 0.8},
}

Record = Mapping[str, Any]


def differences(record: Record) -> Plot:
    """The differences from float32, their interval, and the margin."""
    tests, margin = record["tests"], record["margin"]
    figure = plots.new_figure(plots.WIDE, 1.4 + 0.6 * len(tests))
    axes = figure.subplots()
    axes.axvspan(-margin, margin, color="#000000", alpha=0.08, lw=0)
    axes.axvline(0.0, color="#000000", lw=1)
    for row, test in enumerate(tests):
        color = _color(test["precision"])
        marker = _marker(test["precision"])
        known = [d for d in test["differences"] if d is not None]
        axes.scatter(
            known,
            [row] * len(known),
            alpha=0.5,
            s=24,
            color=color,
            marker=marker,
            label=_short(test["precision"]),
        )
        if test["confidence_interval"] is not None:
            low, high = test["confidence_interval"]
            middle = test["mean_difference"]
            axes.errorbar(
                [middle],
                [row - 0.25],
                xerr=[[middle - low], [high - middle]],
                capsize=4,
                lw=2,
                color=color,
                marker=marker,
            )
    axes.set_yticks(
        range(len(tests)), [_short(test["precision"]) for test in tests]
    )
    axes.set_ylim(len(tests) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(f"{plots.literal(record['metric'])}, less that of float32")
    level = f"{1 - 2 * record['alpha']:.0%}"
    return plots.drawn(
        figure,
        f"Difference of {record['metric']} from float32: a dot for each seed, "
        f"a bar for the mean and its {level} confidence interval. Equivalence "
        "is shown where the bar lies within the shaded margin.",
        " ".join(test["verdict"] for test in tests),
    )


def loss_curves(record: Record) -> Plot:
    """The losses of all runs over each other."""
    figure = plots.new_figure(plots.WIDE, _HEIGHT)
    axes = figure.subplots()
    for precision in record["precisions"]:
        for curve in record["curves"]:
            if curve["precision"] == precision:
                _draw(axes, curve, curve["losses"])
    _add_legend(figure, axes, record["precisions"])
    if all(loss > 0 for c in record["curves"] for loss in c["losses"] if loss):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    ends = [
        f"{c['precision']} seed {c['seed']}: {c['losses'][-1]:.4g}"
        for c in record["curves"]
        if c["losses"] and c["losses"][-1] is not None
    ]
    return plots.drawn(
        figure,
        "Training loss of every run; a colour for each precision.",
        f"Line chart; the last losses are {', '.join(ends) or 'not finite'}.",
    )


def trajectories(record: Record) -> Plot:
    """How far the losses are from those of float32, step by step."""
    figure = plots.new_figure(plots.WIDE, _HEIGHT)
    axes = figure.subplots()
    noise = record["noise"]["trajectory"]
    if noise:
        axes.plot(
            noise["steps"],
            _positive(noise["relative_differences"]),
            color=_NOISE_COLOR,
            lw=1,
            label="float32, seeds 0 and 1",
        )
    epsilons = {}
    for each in record["divergence"]:
        epsilons[each["precision"]] = each["epsilon"]
        _draw(axes, each, _positive(each["relative_differences"]))
    for precision, epsilon in epsilons.items():
        axes.axhline(epsilon, color=_color(precision), lw=2.5, alpha=0.35)
    _add_legend(figure, axes, list(epsilons))
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("relative difference of the loss")
    firsts = [
        f"{each['precision']} seed {each['seed']}: "
        f"{each['first_step'] or 'never'}"
        for each in record["divergence"]
    ]
    return plots.drawn(
        figure,
        "Distance of each run's loss from that of the float32 run of the same "
        "seed. A level line is the rounding of the format: above it the runs "
        "have parted. In gray, two float32 runs of different seeds.",
        f"Line chart; the first step beyond rounding is {', '.join(firsts)}.",
    )


def scales(record: Record) -> Plot | None:
    """The loss scales of all runs, where any run has one that moves."""
    moving = [each for each in record["scales"] if len(each["changes"]) > 1]
    if not moving:
        return None
    figure = plots.new_figure(plots.WIDE, _HEIGHT)
    axes = figure.subplots()
    last_steps = {
        (c["precision"], c["seed"]): c["steps"][-1] for c in record["curves"]
    }
    for each in moving:
        steps, values = zip(*each["changes"], strict=True)
        axes.step(
            [*steps, last_steps[each["precision"], each["seed"]]],
            [*values, values[-1]],
            where="post",
            label=_hidden_label(each),
            **_line(each["precision"]),
        )
    _add_legend(
        figure, axes, list(dict.fromkeys(e["precision"] for e in moving))
    )
    axes.set_yscale("log", base=2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss scale")
    changes = [len(each["changes"]) - 1 for each in moving]
    return plots.drawn(
        figure,
        "The loss scale of every run in which it moved.",
        f"Step chart; the scale changed {min(changes)} to {max(changes)} "
        "times in a run.",
    )


def _draw(axes, run, values):
    precision, steps = run["precision"], run["steps"]
    axes.plot(
        steps,
        [float("nan") if value is None else value for value in values],
        label=_hidden_label(run),
        # One point alone makes no line.
        marker=_marker(precision) if len(steps) == 1 else None,
        **_line(precision),
    )


def _hidden_label(run):
    """Told who hovers; the legend has one line for all seeds."""
    return f"_{run['precision']}, seed {run['seed']}"


def _add_legend(figure, axes, precisions):
    for precision in precisions:
        axes.plot([], [], label=_short(precision), **_line(precision))
    figure.legend(frameon=False, ncols=4, loc="outside upper left")


def _short(precision: str) -> str:
    """Of a map its folder and its name: a whole path leaves no room to draw."""
    return "/".join(pathlib.PurePath(precision).parts[-2:])


def _positive(values):
    # A logarithmic axis has no place for agreement to the last bit.
    return [value or None for value in values]


def _line(precision: str) -> dict[str, Any]:
    """How a precision is drawn; a map of precisions by its name alone."""
    if precision in _LINES:
        return _LINES[precision] | {"color": plots.COLORS[precision]}
    return {
        "ls": (0, (1, 1)),
        "lw": 0.9,
        "alpha": 0.8,
        "color": _color(precision),
    }


def _color(precision: str) -> str:
    more = plots.MORE_COLORS
    # The same in every plot, whatever else is in it.
    return (
        plots.COLORS.get(precision)
        or more[zlib.crc32(precision.encode()) % len(more)]
    )


def _marker(precision: str) -> str:
    return plots.MARKERS.get(precision, "v")
