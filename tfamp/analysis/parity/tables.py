"""The tables of `tfamp parity`, for the terminal and for the report."""

import math
from collections.abc import Mapping
from typing import Any

from tfamp.analysis.page.part import Table

_NONE = "-"


def tables(record: Mapping[str, Any]) -> list[Table]:
    """All tables of a `parity.json`; those without rows left out."""
    made = [
        _metric_table(record),
        _test_table(record),
        _noise_table(record),
        _divergence_table(record),
        _evaluation_table(record),
    ]
    return [table for table in made if table.rows]


def _metric_table(record):
    values = {
        (run["precision"], run["seed"]): run["metric"] for run in record["runs"]
    }
    seeds = range(record["seeds"])
    rows = [
        [
            group["precision"],
            *(number(values[group["precision"], seed]) for seed in seeds),
            number(group["mean"]),
            number(group["standard_deviation"]),
        ]
        for group in record["summary"]
    ]
    return Table(
        f"{record['metric'] or 'metric'} at the end",
        ("precision", *(f"seed {seed}" for seed in seeds), "mean", "std"),
        rows,
    )


def _test_table(record):
    level = f"{1 - 2 * record['alpha']:.0%} interval"
    rows = [
        [
            test["precision"],
            number(test["mean_difference"], sign="+"),
            number(test["standard_deviation"]),
            _interval(test["confidence_interval"]),
            number(test["p_value"], digits=2),
            _decided(test),
        ]
        for test in record["tests"]
    ]
    return Table(
        f"Difference from float32, seed by seed; margin {record['margin']:g}",
        ("precision", "mean", "std", level, "p-value", "equivalent"),
        rows,
    )


def _noise_table(record):
    noise = record["noise"]
    if not noise["differences"]:
        return Table("", (), ())
    rows = [
        [
            "float32 from itself, other seed",
            number(noise["root_mean_square"]),
            number(noise["largest"]),
        ]
    ]
    for test in record["tests"]:
        known = [abs(d) for d in test["differences"] if d is not None]
        rows.append(
            [
                f"{test['precision']} from float32, same seed",
                number(_root_mean_square(known)),
                number(max(known, default=None)),
            ]
        )
    return Table(
        "How large noise alone is",
        ("difference of", "root mean square", "largest"),
        rows,
    )


def _divergence_table(record):
    rows = [
        [
            each["precision"],
            str(each["seed"]),
            f"{each['epsilon']:.2g}",
            number(each["at_first_step"], digits=2),
            str(each["first_step"] or "never"),
        ]
        for each in record["divergence"]
        if each["steps"]
    ]
    return Table(
        "First step whose loss differs from float32's by more than rounding",
        ("precision", "seed", "epsilon", "at step 1", "first step"),
        rows,
    )


def _evaluation_table(record):
    evaluated = [each for each in record["evaluations"] if each["metrics_in"]]
    precisions = list(
        dict.fromkeys(name for each in evaluated for name in each["metrics_in"])
    )
    rows = [
        [
            f"{each['precision']}, seed {each['seed']}",
            *(number(each["metrics_in"].get(name)) for name in precisions),
        ]
        for each in evaluated
    ]
    return Table(
        f"{record['metric']} of the trained weights, evaluated in",
        ("trained in", *precisions),
        rows,
    )


def number(value: float | None, *, digits: int = 4, sign: str = "") -> str:
    """A figure of a table; "-" where there is none."""
    if value is None:
        return _NONE
    return f"{value:{sign}.{digits}g}" if value else "0"


def _root_mean_square(values):
    if not values:
        return None
    return math.sqrt(sum(value**2 for value in values) / len(values))


def _interval(interval):
    if interval is None:
        return _NONE
    low, high = interval
    return f"{number(low, sign='+')} to {number(high, sign='+')}"


def _decided(test: Mapping[str, Any]) -> str:
    if test.get("undecided"):
        return "undecided"
    return "yes" if test["equivalent"] else "no"
