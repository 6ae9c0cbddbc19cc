"""The comparison in tables, for the terminal and as Markdown."""

from collections.abc import Mapping
from typing import Any

from benchmarks.compare.contestants import CONTESTANTS
from tfamp.analysis.page.part import Table

_MIB = 2**20
_ABSENT = "-"

Record = Mapping[str, Any]


def tables(record: Record) -> list[Table]:
    """A table of each model, what proves it one model, and the goals."""
    found = [_model(record, model) for model in record["models"]]
    found += [_sameness(record), _starts(record)]
    if record["goals"]:
        found.append(_goals(record))
    if record["failures"]:
        found.append(_failures(record))
    return found


def to_markdown(record: Record) -> str:
    """The page that stands in `compare.md`."""
    # Imports TensorFlow, which a bad flag need not wait for.
    from tfamp.analysis.page import environment

    lines = ["# tfamp beside stock Keras and PyTorch", ""]
    if record["quick"]:
        lines += [
            "**A quick look: small models, few rounds. No figure here is one "
            "to quote.**",
            "",
        ]
    lines += [
        f"- {label}: {text}" for label, text in environment.rows(dict(record))
    ]
    lines += [f"- {record['threads']} threads, {record['rounds']} rounds", ""]
    for table in tables(record):
        lines += _markdown(table)
    lines += [f"- `{each.name}`: {each.what}" for each in _measured(record)]
    return "\n".join(lines) + "\n"


def _markdown(table: Table) -> list[str]:
    return [
        f"## {table.caption}",
        "",
        f"| {' | '.join(table.columns)} |",
        f"|:--|{'--:|' * (len(table.columns) - 1)}",
        *(f"| {' | '.join(row)} |" for row in table.rows),
        "",
    ]


def _measured(record):
    names = {row["contestant"] for row in record["summary"]}
    return [each for each in CONTESTANTS if each.name in names]


def _model(record, model):
    rows = []
    for row in record["summary"]:
        if row["model"] != model["name"]:
            continue
        time, ratios = row["step_milliseconds"], row["ratios"]
        rows.append(
            (
                _name(row),
                f"{time['median']:.4g}",
                f"{time['lowest']:.4g} to {time['highest']:.4g}",
                _ratio(ratios, "keras"),
                _ratio(ratios, "best_keras"),
                _ratio(ratios, "torch"),
                _ratio(ratios, "best_torch"),
                _ratio(ratios, "float32"),
                _mib(row["memory_growth_bytes"]),
                _ratio(ratios, "torch", "memory"),
            )
        )
    return Table(
        model["title"] + (" (quick)" if record["quick"] else ""),
        (
            "contestant",
            "step, ms",
            "lowest to highest",
            "/ keras",
            "/ best keras",
            "/ torch",
            "/ best torch",
            "/ float32",
            "memory, MiB",
            "memory / torch",
        ),
        rows,
    )


def _sameness(record):
    rows = []
    for model in record["models"]:
        rows.append(
            (
                model["name"],
                f"{model['keras_parameters']:,}",
                _count(model.get("torch_parameters")),
                f"{model['keras_flops'] / 1e9:,.3f}",
                _count(model.get("torch_flops"), 1e9),
                _apart(record, model, is_float32=True),
                _apart(record, model, is_float32=False),
            )
        )
    return Table(
        "One model: weights, operations, and the losses of the first epochs",
        (
            "model",
            "weights",
            "in PyTorch",
            "10^9 operations of a step",
            "in PyTorch",
            "losses apart by, float32",
            "16 bits from float32",
        ),
        rows,
    )


def _apart(record, model, is_float32):
    """The largest difference of the losses of a model."""
    found = [
        each["difference"]
        for each in record["losses"]
        if each["model"] == model["name"]
        and (each["precision"] == "float32") == is_float32
    ]
    if not found:
        return _ABSENT
    return "no number" if None in found else f"{max(found):.1e}"


def _starts(record):
    return Table(
        "First epoch less a later one: tracing and compiling, s"
        + ("; side by side, so no measure" if record["quick"] else ""),
        ("contestant", *(model["name"] for model in record["models"])),
        [
            (
                _name({"contestant": contestant, "precision": precision}),
                *(
                    f"{seconds[model['name']]:.1f}"
                    if model["name"] in seconds
                    else _ABSENT
                    for model in record["models"]
                ),
            )
            for (contestant, precision), seconds in _compile_seconds(
                record
            ).items()
        ],
    )


def _compile_seconds(record):
    found: dict[tuple[str, str], dict[str, float]] = {}
    for start in record["starts"]:
        key = (start["contestant"], start["precision"])
        found.setdefault(key, {})[start["model"]] = start["compile_seconds"]
    return found


def _goals(record):
    return Table(
        "Goals",
        (
            "ratio",
            "of",
            "model",
            "precision",
            "against",
            "goal",
            "measured",
            "lowest to highest",
            "reached",
        ),
        [
            (
                goal["what"],
                goal["contestant"],
                goal["model"],
                goal["precision"],
                goal["against"],
                f"<= {goal['limit']:g}",
                f"{goal['measured']:.3f}",
                f"{goal['lowest']:.3f} to {goal['highest']:.3f}",
                "yes" if goal["reached"] else "no",
            )
            for goal in record["goals"]
        ],
    )


def _failures(record):
    return Table(
        "Failed",
        ("contestant", "model", "what it said"),
        [
            (_name(each), each["model"], each["line"])
            for each in record["failures"]
        ],
    )


def _name(row):
    return f"{row['contestant']}, {row['precision']}"


def _ratio(ratios, name, figure="time"):
    spread = name in ratios and ratios[name][figure]
    return f"{spread['median']:.3f}" if spread else _ABSENT


def _mib(spread):
    return f"{spread['median'] / _MIB:,.0f}" if spread else _ABSENT


def _count(number, unit=1):
    if number is None:
        return _ABSENT
    return f"{number:,}" if unit == 1 else f"{number / unit:,.3f}"
