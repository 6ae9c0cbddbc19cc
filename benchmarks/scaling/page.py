"""The costs in tables, as Markdown, and as a plot."""

from collections.abc import Mapping
from typing import Any

from benchmarks.scaling.series import SERIES
from tfamp.analysis.page import plots
from tfamp.analysis.page.part import Table

Record = Mapping[str, Any]

_COLORS = ("#000000", *plots.MORE_COLORS, "#D55E00")
_COLUMNS = 2
_PANEL_INCHES = 2.6


def tables(record: Record) -> list[Table]:
    """A table of each series, and what a unit more costs."""
    found = [_series(record, name) for name in _measured(record)]
    if record["lines"]:
        found.append(_lines(record))
    return found


def to_markdown(record: Record) -> str:
    """The page that stands in `scaling.md`."""
    # Imports TensorFlow, which a bad flag need not wait for.
    from tfamp.analysis.page import environment

    lines = ["# How the cost of a step grows", ""]
    if record["quick"]:
        lines += ["**A quick look; no figure here is one to quote.**", ""]
    lines += [
        f"- {label}: {text}" for label, text in environment.rows(dict(record))
    ]
    lines += [
        f"- {record['precision']}, {record['threads']} threads, "
        f"{record['rounds']} rounds",
        "",
    ]
    for table in tables(record):
        lines += [
            f"## {table.caption}",
            "",
            f"| {' | '.join(table.columns)} |",
            f"|:--|{'--:|' * (len(table.columns) - 1)}",
            *(f"| {' | '.join(row)} |" for row in table.rows),
            "",
        ]
    return "\n".join(lines)


def plot(record: Record) -> str:
    """An `<svg>` element: a panel of each series that has several values."""
    names = [
        name
        for name in _measured(record)
        if len({p["value"] for p in _points(record, name)}) > 1
    ]
    rows = -(-len(names) // _COLUMNS)
    figure = plots.new_figure(plots.WIDE, _PANEL_INCHES * max(rows, 1))
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, _COLUMNS, number + 1)
        _panel(axes, record, name)
    return plots.to_svg(figure)


def _panel(axes, record, name):
    series = _record_of(name)
    for color, variant in zip(_COLORS, series.variants, strict=False):
        points = [p for p in _points(record, name) if p["variant"] == variant]
        spreads = [p["step_milliseconds"] for p in points]
        axes.errorbar(
            [p["value"] for p in points],
            [s["median"] for s in spreads],
            yerr=[
                [s["median"] - s["lowest"] for s in spreads],
                [s["highest"] - s["median"] for s in spreads],
            ],
            marker="o",
            markersize=4,
            capsize=2,
            color=color,
            label=variant,
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(series.unit)
    axes.set_ylabel("ms a step")
    axes.set_title(series.what, loc="left", fontsize=10)
    if len(series.variants) > 1:
        axes.legend(frameon=False)


def _series(record, name):
    series = _record_of(name)
    return Table(
        series.what,
        (f"{series.unit}, who", "step, ms", "lowest to highest", "weights"),
        [
            (
                f"{point['value']}, {point['variant']}",
                f"{point['step_milliseconds']['median']:.4g}",
                f"{point['step_milliseconds']['lowest']:.4g} to "
                f"{point['step_milliseconds']['highest']:.4g}",
                f"{point['parameters']:,}",
            )
            for point in _points(record, name)
        ],
    )


def _lines(record):
    return Table(
        "What one more costs: a line through the medians",
        ("series, who", "fixed, ms", "each, ms", "of which unit"),
        [
            (
                f"{line['series']}, {line['variant']}",
                f"{line['fixed_milliseconds']:.3g}",
                f"{line['unit_milliseconds']:.3g}",
                _record_of(line["series"]).unit,
            )
            for line in record["lines"]
        ],
    )


def _measured(record):
    return list(dict.fromkeys(point["series"] for point in record["points"]))


def _points(record, name):
    return [point for point in record["points"] if point["series"] == name]


def _record_of(name):
    (found,) = [each for each in SERIES if each.name == name]
    return found
