"""The figures of a benchmark in tables, for the terminal and the report."""

from collections.abc import Mapping
from typing import Any

from tfamp.analysis.bench.callouts import display_name
from tfamp.analysis.bench.figures import BASE
from tfamp.analysis.page.part import Table

_MIB = 2**20
_ABSENT = "-"

Record = Mapping[str, Any]


def tables(record: Record) -> list[Table]:
    """Speed, memory, what a step is made of, and the largest batches."""
    found = [_speed(record), _memory(record), _step(record)]
    if record["largest_batches"]:
        found.append(_largest(record))
    return found


def table_of_runs(record: Record) -> Table:
    """Every run, in the order they were made."""
    return Table(
        "Every run, in this order",
        ("run", "step, ms", "examples/s", "peak, MiB", "compile, s", "input"),
        [
            (
                f"{display_name(run['name'])}, round {run['round']}",
                f"{run['step_milliseconds']:.3g}",
                f"{run['examples_per_second']:,.0f}",
                _mib(run["peak_memory_bytes"]),
                f"{run['compile_seconds']:.1f}",
                f"{run['input_share']:.0%}",
            )
            for run in record["runs"]
        ],
    )


def _speed(record):
    rows = []
    for name, summary in record["summary"].items():
        step = summary["step_milliseconds"]
        ratio = None if name == BASE else record["ratios"][name]["time"]
        rows.append(
            (
                display_name(name),
                f"{step['median']:.3g}",
                f"{step['lowest']:.3g} to {step['highest']:.3g}",
                f"{summary['examples_per_second']['median']:,.0f}",
                "1" if ratio is None else f"{ratio['median']:.3f}",
                _ABSENT if ratio is None else _range(ratio, ".3f"),
            )
        )
    batch = record["runs"][0]["batch_size"]
    return Table(
        f"Speed at the same batch, {batch}: medians of {record['rounds']} "
        "rounds",
        (
            "precision",
            "step, ms",
            "lowest to highest",
            "examples/s",
            "time / float32",
            "lowest to highest of a round",
        ),
        rows,
    )


def _memory(record):
    rows = []
    for name, summary in record["summary"].items():
        ratios = record["ratios"].get(name, {})
        rows.append(
            (
                display_name(name),
                _mib_of(summary["peak_memory_bytes"]),
                "1" if name == BASE else _ratio(ratios["memory"]),
                _mib_of(summary["memory_growth_bytes"]),
                "1" if name == BASE else _ratio(ratios["memory_growth"]),
            )
        )
    where = "of a GPU"
    if record["environment"]["hardware"]["kind"] == "cpu":
        where = "resident, of the process; growth is over what it was before"
    return Table(
        f"Peak memory, {where}",
        ("precision", "peak, MiB", "/ float32", "growth, MiB", "/ float32"),
        rows,
    )


def _step(record):
    rows = [
        (
            display_name(name),
            f"{summary['compile_seconds']['median']:.1f}",
            f"{summary['input_share']['median']:.0%}",
            f"{summary['product_rate']['highest'] / 1e12:.3g}",
            _share(record["shares"][name]["product_share"]),
            _share(record["shares"][name]["peak_share"]),
        )
        for name, summary in record["summary"].items()
    ]
    return Table(
        "What a step is made of",
        (
            "precision",
            "compile, s",
            "waiting for input",
            "rate of large products, 10^12/s",
            "reached of that rate",
            "of the published peak",
        ),
        rows,
    )


def _largest(record):
    batches = record["largest_batches"]
    base = batches[BASE]["rows"]
    limit = record["memory_limit_bytes"]
    within = "" if limit is None else f" within {limit / 2**30:g} GiB"
    return Table(
        f"Largest batch that fits{within}; not at the same batch, so no part "
        "of the ratios above",
        ("precision", "rows that fit", "rows that do not", "/ float32"),
        [
            (
                display_name(name),
                f"{found['rows']:,}",
                _ABSENT if found["fails"] is None else f"{found['fails']:,}",
                f"{found['rows'] / base:.2f}" if base else _ABSENT,
            )
            for name, found in batches.items()
        ],
    )


def _range(spread, form):
    return f"{spread['lowest']:{form}} to {spread['highest']:{form}}"


def _ratio(spread):
    return _ABSENT if spread is None else f"{spread['median']:.3f}"


def _mib_of(spread):
    return _ABSENT if spread is None else _mib(spread["median"])


def _mib(count):
    return _ABSENT if count is None else f"{count / _MIB:,.0f}"


def _share(share):
    return _ABSENT if share is None else f"{share:.1%}"
