"""Exports a model in several formats and kinds, and judges each."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp.analysis.exported import pieces, verdict
from tfamp.analysis.parity.final_metric import choose_metric
from tfamp.errors import InputError
from tfamp.saving import asked, served
from tfamp.saving import export as exporting
from tfamp.saving.report import ExportReport

SCHEMA = "tfamp.export/1"
# What a kind asks of `tfamp.export`: how weights are stored, and whether it is
# given data to calibrate on.
KINDS: dict[str, tuple[str | None, bool]] = {
    "none": (None, False),
    "float16": ("float16", False),
    "int8": ("int8", False),
    "int8-static": ("int8", True),
    "int4": ("int4", False),
    "gptq": ("gptq", True),
}
_ROUNDS = 15
# Below it, hardly anything was quantized.
_SMALL_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be exported, and how it is judged.

    Attributes:
        formats: of `tfamp.export`.
        precision: that is traced.
        kinds: of `KINDS`, but "none", which is always there.
        metric: of the model's; None for an accuracy, or else the loss.
        margin: the largest difference of the metric that does not matter.
        alpha: the chance to call equal what differs by the margin.
        tolerance: as of `tfamp.export`.
        keep: layers that are not quantized; None for the fewest of `order`
            with which the metric is inside of the margin.
        order: paths of the layers that hurt most, the worst first.
    """

    formats: Sequence[str]
    precision: str = "float32"
    kinds: Sequence[str] = ()
    metric: str | None = None
    margin: float = 0.01
    alpha: float = 0.05
    tolerance: float | None = None
    keep: Sequence[str] | None = ()
    order: Sequence[str] = ()


def measure(
    model: keras.Model,
    dataset: tf.data.Dataset,
    calibration: tf.data.Dataset,
    folder: pathlib.Path,
    question: Question,
    *,
    steps: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Exports a model, and evaluates each file in its own runtime.

    Args:
        model: compiled, with the weights to export.
        dataset: to evaluate on.
        calibration: that static quantization takes the ranges from.
        folder: for the files.
        question: what to export.
        steps: batches to evaluate on at most.
        say: told of each file.

    Returns:
        The record of an export.json.
    """
    data = pieces.read(dataset, steps)
    with served.computing(model, "float32"):
        reference = pieces.outputs(pieces.of_model(model), data)
        has_metric = pieces.has_metric(model)
        expected = pieces.values(model, data, reference) if has_metric else {}
        name = choose_metric(expected, question.metric) if has_metric else None
    context = _Context(
        model, data, calibration, folder, question, reference, expected, name
    )
    rows = []
    for format in question.formats:
        plain: dict[str, Any] = {}
        for kind in ("none", *question.kinds):
            row = _row(context, format, kind, plain)
            say(_said(row))
            rows.append(row)
            if kind == "none":
                plain = row
    for row in rows:
        row.pop("run", None)
    return {
        "schema": SCHEMA,
        "model": model.name,
        "precision": question.precision,
        "metric": name,
        "margin": question.margin,
        "alpha": question.alpha,
        "examples": data.rows,
        "files": rows,
        "passed": all(map(is_good, rows)),
    }


def is_good(row: dict[str, Any]) -> bool:
    """Whether a file is there and its metric inside of the margin."""
    return row["problem"] is None and row["verdict"] in (verdict.INSIDE, None)


@dataclasses.dataclass(frozen=True)
class _Context:
    model: keras.Model
    data: pieces.Data
    calibration: tf.data.Dataset
    folder: pathlib.Path
    question: Question
    reference: list[list]
    expected: dict[str, list[float]]
    name: str | None


def _row(context: _Context, format: str, kind: str, plain) -> dict[str, Any]:
    quantize, is_calibrated = KINDS[kind]
    row: dict[str, Any] = {"format": format, "kind": kind, "problem": None}
    keeps: list[tuple[str, ...]] = [()]
    if quantize in ("int8", "int4", "gptq"):
        keeps = (
            list(_growing(context.question.order))
            if context.question.keep is None
            else [tuple(context.question.keep)]
        )
    try:
        if kind == "int8-static" and format == "keras":
            raise InputError(
                "Keras quantizes activations by what each batch holds; use "
                "int8, or another format."
            )
        for keep in keeps:
            row |= _measured(
                context, format, kind, quantize, is_calibrated, keep
            )
            if is_good(row):
                break
    except InputError as error:
        return row | {"problem": str(error), "verdict": None}
    row["latency_ratio"] = None
    if plain.get("run") is not None:
        row["latency_ratio"] = _latency_ratio(
            row["run"], plain["run"], context.data.batches[0][0]
        )
    share = row["quantized_share"]
    row["note"] = None
    if share is not None and share < _SMALL_SHARE:
        row["note"] = f"only {share:.0%} of the weights are quantized"
    return row


def _measured(context, format, kind, quantize, is_calibrated, keep):
    question = context.question
    suffix = asked.SUFFIXES.get(format, "")
    first = context.data.batches[0][0]
    report: ExportReport = exporting.export(
        context.model,
        context.folder / f"{format}-{kind}{suffix}",
        format,
        question.precision if quantize is None else "float32",
        quantize,
        context.calibration if is_calibrated else None,
        batch=first,
        tolerance=question.tolerance,
        keep=keep,
    )
    run = exporting.opened(report, context.model)
    outputs = pieces.outputs(run, context.data)
    seen = pieces.compared(outputs, context.reference)
    row = report.record() | {
        "path": pathlib.Path(report.path).name,
        "run": run,
        "largest_difference": seen.largest_difference,
        "relative_difference": seen.relative_difference,
        "same_choice": seen.same_choice,
        "rows": context.data.rows,
        "batch": "evaluation data",
        "verdict": None,
        "metric": None,
        "reference": None,
        "interval": None,
    }
    if context.name is None:
        return row
    found = pieces.values(context.model, context.data, outputs)
    judged = verdict.judged(
        found[context.name],
        context.expected[context.name],
        question.margin,
        question.alpha,
    )
    named = judged.record()
    return row | named | {"verdict": named["word"]}


def _growing(order: Sequence[str]):
    """None kept, then the worst 1, 2, 4 and so on, up to half of them."""
    yield ()
    count = 1
    while count <= max(1, len(order) // 2):
        yield tuple(order[:count])
        count *= 2


def _latency_ratio(run, plain, batch) -> float | None:
    """Medians of runs that take turns: what disturbs one disturbs both."""
    times: tuple[list[float], list[float]] = ([], [])
    run(batch)
    plain(batch)
    for _ in range(_ROUNDS):
        for each, taken in zip((run, plain), times, strict=True):
            begin = time.perf_counter()
            each(batch)
            taken.append(time.perf_counter() - begin)
    first, second = map(statistics.median, times)
    return first / second if second else None


def _said(row: dict[str, Any]) -> str:
    what = f"{row['format']} {row['kind']}"
    if row["problem"]:
        return f"{what}: {row['problem']}"
    metric = row["metric"]
    figures = f"{row['bytes']:,} bytes"
    if metric is not None:
        figures += f", {metric:.4g} ({row['verdict']})"
    return f"{what}: {figures}"
