"""What a run with an `output_dir` leaves, read back.

A run that goes on after an interruption appends to the logs, and repeats what
came after its last checkpoint: the later lines count.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from tfamp.errors import InputError
from tfamp.files.json_lines import read_json_lines

FILES = ("run.json", "metrics.jsonl", "scale.jsonl")

_NO_METRICS = ("epoch", "time", "elapsed_seconds")
SPEED = ("examples_per_second", "step_milliseconds", "peak_memory_bytes")


@dataclasses.dataclass(frozen=True)
class RunLogs:
    """The logs of a run.

    Attributes:
        record: of `run.json`; empty where there is none.
        epochs: of `metrics.jsonl`, each epoch once.
        changes: of `scale.jsonl`, in the order of steps, without what a
            later run did again.
        repeated_epochs: how many epochs were done again.
    """

    record: dict[str, Any]
    epochs: list[dict[str, Any]]
    changes: list[dict[str, Any]]
    repeated_epochs: int


def is_run(folder: pathlib.Path) -> bool:
    """Whether a run left its logs there."""
    return any((folder / name).exists() for name in FILES)


def read(folder: pathlib.Path) -> RunLogs:
    """The logs in a folder.

    Raises:
        InputError: a file is not what its name says.
    """
    lines = _lines(folder / "metrics.jsonl", "epoch")
    epochs = _latest(lines)
    changes = _lines(folder / "scale.jsonl", "step", "scale", "reason")
    return RunLogs(
        record=_record(folder / "run.json"),
        epochs=epochs,
        changes=_latest_changes(changes),
        repeated_epochs=len(lines) - len(epochs),
    )


def metric_names(epochs: list[dict[str, Any]]) -> list[str]:
    """Loss and metrics of training and evaluation; the loss comes first.

    `val_` twins are not listed, nor what is an array.
    """
    names = {
        name.removeprefix("val_")
        for epoch in epochs
        for name, value in epoch.items()
        if not isinstance(value, (list, str))
        and name not in (*_NO_METRICS, *SPEED)
        and not name.startswith(("loss_scale", "skipped_steps"))
    }
    return sorted(names, key=lambda name: (name != "loss", name))


def is_skip(change: Mapping[str, Any]) -> bool:
    """Whether the step changed no weight, because it was not finite."""
    return change["reason"] == "overflow"


def _record(path):
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).") from error
    found = record.get("schema") if isinstance(record, dict) else None
    if found != "tfamp.run/1":
        raise InputError(
            f"{path} has schema {found!r}; this version reads 'tfamp.run/1'."
        )
    return record


def _lines(path, *keys):
    rows = read_json_lines(path)
    for number, row in enumerate(rows, 1):
        for key in keys:
            if key not in row:
                raise InputError(
                    f"{path} has no {key!r} in line {number}; move it away."
                )
    return rows


def _latest(rows):
    """Drops what a later run did again, and what it never came to."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["epoch"] >= row["epoch"]:
            kept.pop()
        kept.append(row)
    return kept


def _latest_changes(rows):
    """Keeps what counts in the end: see `tfamp.overflow.timeline`."""
    by_optimizer: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        kept = by_optimizer.setdefault(row.get("optimizer"), [])
        if row["reason"] == "start":
            kept.clear()
        elif row["reason"] == "resumed":
            while kept and kept[-1]["step"] > row["step"]:
                kept.pop()
        kept.append(row)
    changes = [row for kept in by_optimizer.values() for row in kept]
    return sorted(changes, key=lambda row: row["step"])
