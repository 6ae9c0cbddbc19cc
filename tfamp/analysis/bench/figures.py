"""From the runs of a benchmark to medians, spreads and ratios to float32."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BASE = "float32"

# Of a run, what is summed up over the rounds.
_SUMMED_UP = (
    "step_milliseconds",
    "in_memory_step_milliseconds",
    "examples_per_second",
    "compile_seconds",
    "peak_memory_bytes",
    "memory_growth_bytes",
    "input_share",
    "product_rate",
    "skipped_share",
)
# Of which the ratio to float32 is taken: time, and memory.
_COMPARED = {
    "time": "step_milliseconds",
    "memory": "peak_memory_bytes",
    "memory_growth": "memory_growth_bytes",
}

Run = Mapping[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, lowest and highest of some values; one is enough."""
    quartiles = [values[0]] * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "low_quartile": quartiles[0],
        "high_quartile": quartiles[2],
        "lowest": min(values),
        "highest": max(values),
    }


def complete(run: Run) -> dict[str, Any]:
    """A run with what follows from its figures: growth, share of skips."""
    peak, before = run["peak_memory_bytes"], run["resident_bytes_before"]
    has_both = peak is not None and before is not None
    return {
        **run,
        "memory_growth_bytes": peak - before if has_both else None,
        "skipped_share": run["skipped_steps"] / run["timed_steps"],
    }


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By name of a series: the spread of each figure over its rounds.

    A figure that no device tells is None.
    """
    return {
        name: {
            figure: _spread_or_none([run[figure] for run in series])
            for figure in _SUMMED_UP
        }
        for name, series in _series(runs).items()
    }


def ratios(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By name of a series but float32: its figures over those of float32.

    A run is compared with the float32 run of the same round, made just before
    it: what the machine does in the meantime touches both.

    Returns:
        `time`, `memory` and, on a CPU, `memory_growth` of each: a spread over
        the rounds with them as `rounds`; None where a device does not tell.
    """
    series = _series(runs)
    base = {run["round"]: run for run in series[BASE]}
    return {
        name: {
            ratio: _ratios_of(figure, these, base)
            for ratio, figure in _COMPARED.items()
        }
        for name, these in series.items()
        if name != BASE
    }


def reached(
    flops: int | None, milliseconds: float, rate: float | None, devices: int
) -> float | None:
    """The share of a rate that products reach, when they take a whole step.

    Args:
        flops: of a step on all devices; None where they are not known.
        milliseconds: of a step.
        rate: operations a second of one device; None where it is not known.
        devices: how many there are.
    """
    if flops is None or rate is None:
        return None
    return flops / (milliseconds / 1000) / (rate * devices)


def shares_of_rates(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name of a series: shares of the device's rates that it reaches.

    Args:
        record: with `summary`, `flops_per_step`, `devices`, `published_peaks`.

    Returns:
        `product_share`: of the measured rate of large matrix products, in
        that precision; `peak_share`: of the published peak.
    """
    shares = {}
    for name, summary in record["summary"].items():
        known = (
            record["flops_per_step"],
            summary["step_milliseconds"]["median"],
        )
        # What else the machine does can only lower what it is able to.
        rate = summary["product_rate"]["highest"]
        peak = record["published_peaks"][name]
        shares[name] = {
            "product_share": reached(*known, rate, record["devices"]),
            "peak_share": reached(*known, peak, record["devices"]),
        }
    return shares


def _ratios_of(figure, runs, base):
    values = [
        None
        if run[figure] is None or not base[run["round"]][figure]
        else run[figure] / base[run["round"]][figure]
        for run in runs
    ]
    found = _spread_or_none(values)
    return found and {**found, "rounds": values}


def _spread_or_none(values):
    return None if None in values else spread(values)


def _series(runs: Sequence[Run]) -> dict[str, list[Run]]:
    series: dict[str, list[Run]] = {}
    for run in runs:
        series.setdefault(run["name"], []).append(run)
    return series
