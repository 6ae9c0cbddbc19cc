"""A benchmark in a report: verdict, bars, tables, and what is to be doubted."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tfamp.analysis.bench import callouts, tables
from tfamp.analysis.bench.figures import BASE
from tfamp.analysis.page import plots
from tfamp.analysis.page.part import Part, Plot

Record = Mapping[str, Any]


def part(record: Record) -> Part:
    """What a report says of a benchmark.

    Args:
        record: what `bench.json` holds.
    """
    return Part(
        title="Speed and memory",
        verdict=verdict(record),
        remarks=[callout["message"] for callout in record["callouts"]],
        is_good=_is_good(record),
        is_undecided=_is_undecided(record),
        plots=[_ratio_plot(record)] if record["ratios"] else [],
        tables=[
            *tables.tables(record),
            tables.table_of_runs(record),
        ],
        notes=notes(record),
    )


def verdict(record: Record) -> str:
    """A sentence on each precision."""
    sentences = [*record["verdicts"].values()]
    if not sentences:
        sentences = ["Only float32 was measured: there is nothing to compare."]
    return " ".join(sentences)


def notes(record: Record) -> list[str]:
    """How it was measured, and what the figures leave out."""
    rounds = record["rounds"]
    found = [
        f"Each precision ran in {rounds} processes of its own, in turn. A "
        "ratio compares runs of one round, made one after the other. A "
        "difference is claimed where all rounds, at least "
        f"{callouts.LEAST_ROUNDS}, fall on one side of 1: without any "
        f"difference, chance does that once in {2 ** (rounds - 1):,} times.",
        "Steps are those of the recipe's own call of fit. The first call, "
        "which compiles, and those until fit settles on how many steps go "
        "into one, do not count. A step's time is the median of windows at "
        "whose ends fit reads its metrics; the device waits for nothing else.",
        "Waiting for input: how much less a step takes with batches that are "
        "held in memory, measured in the same process; below 0 it is noise.",
    ]
    if record["flops_per_step"] is None:
        found.append(
            "The operations of a step cannot be counted: "
            f"{record['flops_reason']}."
        )
    else:
        found.append(
            f"The matrix products and convolutions of a step are "
            f"{record['flops_per_step'] / 1e9:,.3g} * 10^9 operations, "
            "forward and backward; what works on single elements is not "
            "counted. The rate of large products was measured beside each run."
        )
    if any(record["published_peaks"].values()):
        found.append(
            "Published peaks are the vendor's figures, of dense products."
        )
    return found


def _is_good(record) -> bool | None:
    """Whether a 16-bit precision is shown to be faster, and no doubt left."""
    general = any(callout["name"] is None for callout in record["callouts"])
    doubted = {callout["name"] for callout in record["callouts"]} - {None}
    compared = {n: r["time"] for n, r in record["ratios"].items()}
    compared = {n: r for n, r in compared.items() if n.startswith("mixed_")}
    if not compared:
        return None
    return not general and any(
        callouts.is_claimed(ratio)
        and ratio["median"] < 1
        and not {name, BASE} & doubted
        for name, ratio in compared.items()
    )


def _is_undecided(record) -> bool:
    """Whether nothing is shown yet of a 16-bit precision."""
    found = {
        callouts.decision(ratio["time"])
        for name, ratio in record["ratios"].items()
        if name.startswith("mixed_")
    }
    return "undecided" in found and "faster" not in found


def _ratio_plot(record) -> Plot:
    names = list(record["ratios"])
    kinds = {"time": "time of a step"}
    if all(record["ratios"][name]["memory_growth"] for name in names):
        kinds["memory_growth"] = "memory that training adds"
    elif all(record["ratios"][name]["memory"] for name in names):
        kinds["memory"] = "peak memory"
    figure = plots.new_figure(plots.WIDE, 1.5 + 0.9 * len(names))
    for position, (kind, label) in enumerate(kinds.items(), start=1):
        axes = figure.add_subplot(1, len(kinds), position)
        _bars(axes, [record["ratios"][name][kind] for name in names], names)
        # In lines: two of them stand side by side on a phone.
        axes.set_xlabel(textwrap.fill(f"{label}, float32 = 1", 16))
        if position > 1:
            axes.set_yticklabels([])
    values = "; ".join(
        f"{callouts.display_name(name)}: "
        + ", ".join(
            f"{label} {record['ratios'][name][kind]['median']:.2f} of float32's"
            for kind, label in kinds.items()
        )
        for name in names
    )
    return plots.drawn(
        figure,
        "What a precision takes, as a part of what float32 takes at the same "
        "batch; less is better. Bars are medians over the rounds, lines go "
        "from the lowest to the highest round, points are the rounds.",
        f"{values}.",
    )


def _bars(axes, ratios: Sequence[Mapping[str, Any]], names) -> None:
    for row, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
        middle = ratio["median"]
        color = plots.COLORS.get(name, plots.MORE_COLORS[0])
        axes.barh(row, middle, height=0.55, color=color, alpha=0.6)
        axes.errorbar(
            middle,
            row,
            xerr=[[middle - ratio["lowest"]], [ratio["highest"] - middle]],
            color="#222222",
            capsize=4,
        )
        axes.plot(
            ratio["rounds"],
            [row] * len(ratio["rounds"]),
            plots.MARKERS.get(name, "D"),
            color=color,
            markeredgecolor="#222222",
            markersize=5,
            label=f"_{callouts.display_name(name)}, rounds",
        )
        axes.annotate(
            f"{middle:.2f}",
            # Above the bar, in which the lines and points are.
            (0, row - 0.28),
            xytext=(4, 1),
            textcoords="offset points",
            verticalalignment="bottom",
        )
    axes.axvline(1, color=plots.COLORS[BASE], linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)))
    axes.set_yticklabels(map(callouts.display_name, names))
    # From the top, and as thick for one bar as for several.
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
