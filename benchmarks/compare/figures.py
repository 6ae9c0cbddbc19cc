"""From the turns of contestants to medians, spreads and ratios."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.compare.contestants import CONTESTANTS
from tfamp.analysis.bench.figures import spread

Row = Mapping[str, Any]

_SUMMED_UP = ("step_milliseconds", "memory_growth_bytes", "peak_memory_bytes")
_RATIOS = {"time": "step_milliseconds", "memory": "memory_growth_bytes"}
_FRAMEWORKS = {each.name: each.framework for each in CONTESTANTS}


def run_of(model: str, steps: int, turn: Row) -> dict[str, Any]:
    """What one turn of a contestant comes to.

    Args:
        model: its name.
        steps: of an epoch.
        turn: as `race.Outcome` has it.
    """
    peak, before = turn["peak_memory_bytes"], turn["memory_before_bytes"]
    has_both = peak is not None and before is not None
    waited = turn["waiting_seconds"]
    return {
        "model": model,
        "contestant": turn["contestant"],
        "precision": turn["precision"],
        "round": turn["round"],
        "step_milliseconds": 1000
        * statistics.median(turn["epoch_seconds"])
        / steps,
        "peak_memory_bytes": peak,
        "memory_growth_bytes": peak - before if has_both else None,
        "waiting_cpu_share": turn["waiting_cpu_seconds"] / waited
        if waited
        else 0.0,
    }


def summarize(runs: Sequence[Row]) -> list[dict[str, Any]]:
    """A row of each model, contestant and precision.

    Args:
        runs: as `run_of` makes them.

    Returns:
        `model`, `contestant`, `precision`, the spread over the rounds of each
        figure (None where a device does not tell), and `ratios`: by name
        `against`, the contestant, and the spread of `time` and `memory` as
        parts of its own in the same round. The names are:

        *   `keras`, `torch`: the plain one of that framework;
        *   `best_keras`, `best_torch`: its fastest one at that precision;
        *   `bare`: tfamp without a LossScaleOptimizer;
        *   `float32`: the contestant itself in float32.
    """
    series: dict[tuple[str, str, str], list[Row]] = {}
    for run in runs:
        key = (run["model"], run["contestant"], run["precision"])
        series.setdefault(key, []).append(run)
    rows = []
    for (model, contestant, precision), these in series.items():
        rivals = {
            name: series[model, name, precision]
            for name in _FRAMEWORKS
            if (model, name, precision) in series
        }
        others = {
            "keras": rivals.get("keras"),
            "best_keras": _fastest(rivals, "keras"),
            "torch": rivals.get("torch"),
            "best_torch": _fastest(rivals, "torch"),
            "bare": rivals.get("tfamp_bare"),
            "float32": series.get((model, contestant, "float32")),
        }
        rows.append(
            {
                "model": model,
                "contestant": contestant,
                "precision": precision,
                **{
                    figure: _spread(run[figure] for run in these)
                    for figure in _SUMMED_UP
                },
                "ratios": {
                    name: _ratios(these, other)
                    for name, other in others.items()
                    if other is not None and other is not these
                },
            }
        )
    return rows


def _fastest(rivals: Mapping[str, Sequence[Row]], framework: str):
    found = [
        runs for name, runs in rivals.items() if _FRAMEWORKS[name] == framework
    ]
    return min(
        found,
        key=lambda runs: statistics.median(
            r["step_milliseconds"] for r in runs
        ),
        default=None,
    )


def _ratios(runs: Sequence[Row], others: Sequence[Row]) -> dict[str, Any]:
    """Round by round: what the machine does meanwhile touches both."""
    by_round = {run["round"]: run for run in others}
    pairs = [
        (run, by_round[run["round"]])
        for run in runs
        if run["round"] in by_round
    ]
    return {
        "against": others[0]["contestant"],
        **{
            name: _spread(
                ours[figure] / theirs[figure]
                if ours[figure] is not None and theirs[figure]
                else None
                for ours, theirs in pairs
            )
            for name, figure in _RATIOS.items()
        },
    }


def _spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    values = list(values)
    if not values or None in values:
        return None
    return {**spread(values), "rounds": values}
