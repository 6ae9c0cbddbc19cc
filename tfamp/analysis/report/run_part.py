"""A training run on the page of a report: curves, loss scale, skips, speed."""

import math
import pathlib
from typing import Any

from tfamp.analysis.page import environment
from tfamp.analysis.page.part import Part, Table
from tfamp.analysis.report import run_logs, run_plots
from tfamp.analysis.report.run_logs import RunLogs

# The file has all; more rows than this help nobody on a page.
_SHOWN_SKIPS = 200

# The caption of the table that all runs have.
EPOCHS = "Each epoch"

# Of a timeline's lines, those that are no event.
_BEGINNINGS = ("start", "resumed")

_SKIP_COLUMNS = {
    "step": "step",
    "epoch": "epoch",
    "scale": "scale after it",
    "optimizer": "optimizer",
    "at_fault": "at fault",
    "layer": "first in layer",
    "replica": "replica",
    "worker": "worker",
}


def part(folder: pathlib.Path) -> Part:
    """The run whose logs a folder holds.

    Raises:
        InputError: a log cannot be read, or matplotlib is missing.
    """
    logs = run_logs.read(folder)
    return Part(
        title="Training run",
        verdict=_verdict(logs),
        is_good=_is_good(logs),
        plots=_plots(logs),
        tables=_tables(logs),
        notes=_notes(logs),
        subject=str(logs.record.get("recipe") or ""),
        environment=environment.rows(logs.record),
    )


def _verdict(logs: RunLogs) -> str:
    sentences = [_what_ran(logs)]
    if logs.epochs:
        last = logs.epochs[-1]
        figures = [
            f"{name} {figure(last[name])}"
            for name in metric_columns(logs.epochs)
            if name in last
        ]
        sentences.append(f"It ended at {', '.join(figures)}.")
    skips = num_skips(logs)
    if skips is not None:
        steps = {0: "No step was", 1: "1 step was"}.get(
            skips, f"{skips} steps were"
        )
        sentences.append(f"{steps} skipped.")
    blamed = _blamed(logs)
    if blamed and blamed[0].get("message"):
        sentences.append(f"Step {blamed[0]['step']}: {blamed[0]['message']}")
    return " ".join(sentences)


def _what_ran(logs: RunLogs) -> str:
    precision = logs.record.get("precision", "A run")
    epochs = f"{len(logs.epochs)} epoch{'' if len(logs.epochs) == 1 else 's'}"
    reason = logs.record.get("exit_reason")
    if reason == "finished":
        return f"{precision}, {epochs}, finished."
    if reason is None:
        return f"{precision}, {epochs}, not finished."
    return f"{precision}, ended after {epochs}: {reason.rstrip('.')}."


def _is_good(logs: RunLogs) -> bool | None:
    last = logs.epochs[-1] if logs.epochs else {}
    is_finite = all(
        last.get(name, 0) is not None for name in metric_columns(logs.epochs)
    )
    if _blamed(logs) or not is_finite:
        return False
    reason = logs.record.get("exit_reason")
    # An interruption is nobody's fault, and a run under way may end well.
    if reason in (None, "interrupted"):
        return None
    return reason == "finished"


def _blamed(logs: RunLogs) -> list[dict[str, Any]]:
    """The skipped steps that something else than the scale is to blame for."""
    return [
        change
        for change in logs.changes
        if change.get("at_fault") not in (None, "scale", "unknown")
    ]


def _plots(logs: RunLogs):
    precision = logs.record.get("precision", "")
    epochs = logs.epochs
    metrics = run_logs.metric_names(epochs)
    drawn = [run_plots.metric(epochs, name, precision) for name in metrics]
    if any(change["reason"] not in _BEGINNINGS for change in logs.changes):
        drawn.append(run_plots.scale_timeline(logs.changes))
    elif run_plots.columns(epochs, "loss_scale"):
        drawn.append(run_plots.scale_by_epoch(epochs))
    if run_plots.columns(epochs, run_logs.LEARNING_RATE):
        drawn.append(run_plots.learning_rate(epochs))
    if run_plots.columns(epochs, "examples_per_second"):
        drawn.append(run_plots.throughput(epochs, precision))
    return drawn


def _tables(logs: RunLogs) -> list[Table]:
    tables = []
    if logs.epochs:
        tables.append(_epoch_table(logs.epochs))
    if any(map(run_logs.is_skip, logs.changes)):
        tables.append(_skip_table(logs.changes))
    return tables


def _epoch_table(epochs: list[dict[str, Any]]) -> Table:
    names = metric_columns(epochs)
    starts = (run_logs.LEARNING_RATE, "loss_scale", "skipped_steps")
    for start in (*starts, *run_logs.SPEED):
        names += run_plots.columns(epochs, start)
    return Table(
        EPOCHS,
        ["epoch", *map(heading, names)],
        [
            [
                str(epoch["epoch"] + 1),
                *(cell(name, epoch.get(name, "")) for name in names),
            ]
            for epoch in epochs
        ],
    )


def _skip_table(changes: list[dict[str, Any]]) -> Table:
    skips = [change for change in changes if run_logs.is_skip(change)]
    shown = skips[:_SHOWN_SKIPS]
    caption = "Skipped steps"
    if len(shown) < len(skips):
        caption += f", the first {len(shown)} of {len(skips)}"
    names = [
        name
        for name in _SKIP_COLUMNS
        if any(change.get(name) is not None for change in skips)
    ]
    return Table(
        caption,
        [_SKIP_COLUMNS[name] for name in names],
        [
            [_skip_cell(name, each.get(name)) for name in names]
            for each in shown
        ],
    )


def _skip_cell(name, value):
    if value is None:
        return ""
    if name == "scale":
        return run_plots.power_of_two(value)
    return str(value + 1 if name == "epoch" else value)


def metric_columns(epochs: list[dict[str, Any]]) -> list[str]:
    """Loss and metrics, each evaluation before its training."""
    return [
        name
        for metric in run_logs.metric_names(epochs)
        for name in (f"val_{metric}", metric)
        if any(name in epoch for epoch in epochs)
    ]


def heading(name: str) -> str:
    """The name of a log as the head of a column."""
    return {
        "examples_per_second": "examples/s",
        "step_milliseconds": "ms/step",
        "peak_memory_bytes": "peak memory (GiB)",
    }.get(name, name.replace("_", " "))


def cell(name: str, value: Any) -> str:
    """A value of a log, in its unit."""
    if value == "":
        return ""
    if value is None:
        return "not finite"
    if name.startswith("loss_scale"):
        return run_plots.power_of_two(value)
    formats = {
        run_logs.LEARNING_RATE: ".4g",
        "examples_per_second": ",.0f",
        "step_milliseconds": ".4g",
        "peak_memory_bytes": ".2f",
    }
    if name.startswith("skipped_steps"):
        return f"{value:.0f}"
    if name == "peak_memory_bytes":
        value /= 2**30
    return f"{value:{formats[name]}}" if name in formats else figure(value)


def figure(value: float | None) -> str:
    """A metric with four decimals, or as a power of ten."""
    if value is None or math.isnan(value):
        return "not finite"
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{value:.4f}" if plain else f"{value:.3e}"


def num_skips(logs: RunLogs) -> int | None:
    """All skipped steps; None where nothing tells."""
    # The timeline has the steps of an epoch that was not finished, too.
    if logs.changes:
        return sum(map(run_logs.is_skip, logs.changes))
    names = run_plots.columns(logs.epochs, "skipped_steps")
    if not names:
        return None
    return round(
        sum(epoch.get(name) or 0 for epoch in logs.epochs for name in names)
    )


def _notes(logs: RunLogs) -> list[str]:
    notes = []
    if logs.repeated_epochs:
        notes.append(
            f"{logs.repeated_epochs} lines of metrics.jsonl are left out: a "
            "later run into the same folder did these epochs again."
        )
    if any(map(run_logs.is_skip, logs.changes)):
        notes.append(
            "Skipped steps while the scale comes down from where it starts, "
            "and one now and then after it has grown, are how dynamic loss "
            "scaling finds the largest scale that fits."
        )
    not_finite = [
        str(epoch["epoch"] + 1)
        for epoch in logs.epochs
        if any(epoch.get(n, 0) is None for n in metric_columns(logs.epochs))
    ]
    if not_finite:
        plural = "s" if len(not_finite) > 1 else ""
        notes.append(
            f"A metric is not finite in epoch{plural} {', '.join(not_finite)}."
        )
    return notes
