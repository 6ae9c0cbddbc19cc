"""What several folders hold, over each other and in one table."""

from collections.abc import Mapping, Sequence
from typing import Any

from tfamp.analysis.page.part import Part, Plot, Table
from tfamp.analysis.parity.final_metric import is_greater_better
from tfamp.analysis.report import overlays, run_logs, run_part, run_plots
from tfamp.analysis.report.run_logs import RunLogs

# Of the settings, what differs in every two runs and says nothing.
_OWN_PLACES = ("output_dir", "checkpoint_dir")
_ABSENT = "-"

Runs = Mapping[str, RunLogs]


def runs_part(runs: Runs) -> Part:
    """Runs in one table, and their curves in one plot for each metric.

    Args:
        runs: by the name of their folder; two or more.
    """
    epochs = {name: logs.epochs for name, logs in runs.items()}
    return Part(
        title="Runs side by side",
        verdict=_verdict(runs),
        remarks=_remarks(runs),
        plots=[*_plots(epochs)],
        tables=[_table(runs)],
    )


def tables_part(chapters: Sequence[tuple[str, Sequence[Part]]]) -> Part | None:
    """The first tables of analyses that lie in several folders, as one each.

    Args:
        chapters: folders and their parts.

    Returns:
        None where no two folders hold an analysis of one kind.
    """
    by_title: dict[str, list[tuple[str, Part]]] = {}
    for name, parts in chapters:
        for part in parts:
            # A run's is a table of epochs; `runs_part` has one of runs.
            if part.tables and part.tables[0].caption != run_part.EPOCHS:
                by_title.setdefault(part.title, []).append((name, part))
    tables = [
        _merged(title, found)
        for title, found in by_title.items()
        if len(found) > 1 and _are_alike(found)
    ]
    if not tables:
        return None
    names = " and ".join(table.caption for table in tables)
    count = max(len(found) for found in by_title.values())
    return Part(
        title="Side by side",
        verdict=f"{names}: {count} folders in one table.",
        tables=tables,
    )


def _are_alike(found: Sequence[tuple[str, Part]]) -> bool:
    return len({tuple(part.tables[0].columns) for _, part in found}) == 1


def _merged(title: str, found: Sequence[tuple[str, Part]]) -> Table:
    return Table(
        title,
        ("folder", *found[0][1].tables[0].columns),
        [(name, *row) for name, part in found for row in part.tables[0].rows],
    )


def _verdict(runs: Runs) -> str:
    ends = {name: logs.epochs[-1] for name, logs in runs.items() if logs.epochs}
    metrics = _metrics(logs.epochs for logs in runs.values())
    # What was evaluated says more; an accuracy is what one asks for.
    judged = sorted(
        (metric for metric in metrics if _known(ends, metric)),
        key=lambda m: (not m.startswith("val_"), "accuracy" not in m),
    )
    if not judged:
        return f"{len(runs)} runs; no metric is in two of them."
    metric = judged[0]
    values = _known(ends, metric)
    best = (max if is_greater_better(metric) else min)(values.values())
    names = [name for name, value in values.items() if value == best]
    return (
        f"{len(runs)} runs. The best {metric} at the end is "
        f"{run_part.figure(best)}, of {' and '.join(names)}. One run of each "
        "says little of a difference: `tfamp parity` tests one over seeds."
    )


def _known(ends, metric) -> dict[str, float]:
    """The runs' values of a metric that two or more have, and finite."""
    found = {
        name: end[metric]
        for name, end in ends.items()
        if isinstance(end.get(metric), (int, float))
    }
    return found if len(found) > 1 else {}


def _remarks(runs: Runs) -> list[str]:
    """What was set differently."""
    configs = {
        name: logs.record.get("config") or {} for name, logs in runs.items()
    }
    fields = dict.fromkeys(
        field for config in configs.values() for field in config
    )
    remarks = []
    for field in fields:
        values = {
            name: config[field]
            for name, config in configs.items()
            if field in config
        }
        texts = set(map(str, values.values()))
        if len(texts) > 1 and field not in _OWN_PLACES:
            said = ", ".join(f"{v} in {name}" for name, v in values.items())
            remarks.append(f"{field}: {said}.")
    return remarks


def _table(runs: Runs) -> Table:
    metrics = _metrics(logs.epochs for logs in runs.values())
    more = [
        name
        for name in ("learning_rate", "loss_scale", *run_logs.SPEED)
        if any(name in epoch for logs in runs.values() for epoch in logs.epochs)
    ]
    rows = []
    for name, logs in runs.items():
        last: dict[str, Any] = logs.epochs[-1] if logs.epochs else {}
        skips = run_part.num_skips(logs)
        rows.append(
            [
                name,
                logs.record.get("precision", _ABSENT),
                str(len(logs.epochs)),
                *(_cell(metric, last) for metric in metrics),
                _ABSENT if skips is None else str(skips),
                *(_cell(each, last) for each in more),
            ]
        )
    return Table(
        "Each run at its end",
        [
            *("run", "precision", "epochs"),
            *map(run_part.heading, metrics),
            "skipped steps",
            *map(run_part.heading, more),
        ],
        rows,
    )


def _cell(name, epoch):
    return run_part.cell(name, epoch[name]) if name in epoch else _ABSENT


def _metrics(all_epochs) -> list[str]:
    """What any run logs, evaluation before training, the loss first."""
    rows = [epoch for epochs in all_epochs for epoch in epochs]
    return run_part.metric_columns(rows)


def _plots(epochs: Mapping[str, list[dict[str, Any]]]) -> list[Plot]:
    rows = [epoch for each in epochs.values() for epoch in each]
    names = run_part.metric_columns(rows)
    # One line a run: of a metric that was evaluated, the evaluation.
    names = [name for name in names if f"val_{name}" not in names]
    names += run_plots.columns(rows, run_logs.LEARNING_RATE)
    scaled = run_plots.columns(rows, "loss_scale")
    if any(epoch.get(name, 1) != 1 for epoch in rows for name in scaled):
        names += scaled
    names += run_plots.columns(rows, "examples_per_second")
    return [overlays.metric(epochs, name) for name in names]
