"""The page of a report about `parity.json`."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.page.part import Part, Plot
from tfamp.analysis.parity import plots, tables
from tfamp.analysis.parity import words as parity_words


def part(record: Mapping[str, Any]) -> Part:
    """What `tfamp parity` found.

    Args:
        record: as `tfamp.analysis.parity.record` makes it.
    """
    drawn: list[Plot | None] = []
    if record["metric"]:
        drawn.append(plots.differences(record))
    if any(curve["steps"] for curve in record["curves"]):
        drawn.append(plots.loss_curves(record))
        drawn.append(plots.trajectories(record))
        drawn.append(plots.scales(record))
    return Part(
        title="Parity with float32",
        verdict=_verdict(record),
        is_good=all(record["equivalent"].values()),
        is_undecided=_is_undecided(record),
        plots=[plot for plot in drawn if plot is not None],
        tables=tables.tables(record),
        notes=_notes(record),
        remarks=parity_words.sentences(
            record["tests"],
            record["metric"],
            record["margin"],
            record["summary"][0]["mean"],
        ),
    )


def _verdict(record):
    by_words: dict[str, list[str]] = {
        "Not equivalent to float32": [],
        "Undecided, for want of seeds": [],
        "Equivalent to float32": [],
    }
    for test in record["tests"]:
        words = (
            "Equivalent to float32"
            if test["equivalent"]
            # Records of 0.1.0 do not say.
            else "Undecided, for want of seeds"
            if test.get("undecided")
            else "Not equivalent to float32"
        )
        by_words[words].append(test["precision"])
    return " ".join(
        f"{words}: {', '.join(names)}."
        for words, names in by_words.items()
        if names
    )


def _is_undecided(record):
    open_tests = [t for t in record["tests"] if not t["equivalent"]]
    return bool(open_tests) and all(t.get("undecided") for t in open_tests)


def _notes(record):
    level = f"{1 - 2 * record['alpha']:.0%}"
    notes = [
        f"Recipe {record['recipe']}, {record['seeds']} seeds: equal initial "
        "weights, equal data in equal order and an equal budget in every "
        "precision, each run in a process of its own.",
        "Two one-sided t-tests of the differences, paired by seed (Schuirmann, "
        f"1987), at alpha {record['alpha']:g}: equivalence is shown where the "
        f"{level} confidence interval of the mean difference lies within the "
        f"margin of {record['margin']:g}. That a difference is not seen would "
        "show nothing.",
        "Trajectories part at the first step whose losses differ, relative to "
        "the larger one, by more than the spacing of the compute format at 1. "
        "At step 1 the weights are equal, and all of the difference is "
        "rounding.",
    ]
    if record["tests"] and any(
        test["method"] == "sign test" for test in record["tests"]
    ):
        notes.append(
            "Where all seeds differ by the same amount a t-test has no spread "
            "to work with; a sign test of the median takes its place, which "
            "needs 5 seeds for alpha 0.05."
        )
    failed = [run for run in record["runs"] if run["status"] != "finished"]
    notes += [
        f"{run['precision']}, seed {run['seed']}, {run['status']}: "
        f"{run['reason']}"
        for run in failed
    ]
    reasons = {
        each["reason"] for each in record["evaluations"] if each["reason"]
    }
    reasons -= {run["reason"] for run in failed}
    notes += [
        f"Trained weights were not evaluated in each precision: {reason}."
        for reason in sorted(reasons)
    ]
    return notes
