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

LEARNING_RATE = "learning_rate"
_NO_METRICS = ("epoch", "time", "elapsed_seconds", LEARNING_RATE)
# What each file holds, by key: types, and whether it may be left out.
_TEXT, _NUMBER = (str, type(None)), (int, float, type(None))
_EPOCH = {"epoch": (int,)}
_METRIC = (*_NUMBER, list, str, bool)
_CHANGE = {
    "step": (int,),
    "scale": _NUMBER,
    "reason": (str,),
}
_CHANGE_MORE = {
    "epoch": (int, type(None)),
    "optimizer": _TEXT,
    "at_fault": _TEXT,
    "layer": _TEXT,
    "message": _TEXT,
    "replica": (int, type(None)),
    "worker": (int, type(None)),
}
_RECORD = {
    "precision": (str,),
    "exit_reason": _TEXT,
    "command": _TEXT,
    "recipe": _TEXT,
    "start_time": _TEXT,
    "strategy": _TEXT,
    "replicas": (int, type(None)),
    "versions": (dict, type(None)),
    "hardware": (dict, type(None)),
    "git": (dict, type(None)),
    "config": (dict, type(None)),
    "environment": (dict, type(None)),
}
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
    lines = _lines(folder / "metrics.jsonl", _EPOCH, others=_METRIC)
    epochs = _latest(lines)
    changes = _lines(folder / "scale.jsonl", _CHANGE)
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
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).") from error
    found = record.get("schema") if isinstance(record, dict) else None
    if found != "tfamp.run/1":
        raise InputError(
            f"{path} has schema {found!r}; this version reads 'tfamp.run/1'."
        )
    for key in record.keys() & _RECORD.keys():
        _check(path, key, record[key], _RECORD[key])
    return record


def _lines(path, needed, others=None):
    rows = read_json_lines(path)
    for number, row in enumerate(rows, 1):
        where = f"line {number}, "
        for key, types in needed.items():
            if key not in row:
                raise InputError(
                    f"{path} has no {key!r} in line {number}; move it away."
                )
            _check(path, f"{where}{key}", row[key], types)
        for key in row.keys() - needed.keys():
            types = others or _CHANGE_MORE.get(key)
            if types is not None:
                _check(path, f"{where}{key}", row[key], types)
    return rows


def _check(path, where, value, types):
    """A bool is an int to Python, and no number of an epoch."""
    is_right = isinstance(value, types) and (
        not isinstance(value, bool) or bool in types
    )
    if not is_right:
        names = " or ".join(
            "null" if each is type(None) else each.__name__ for each in types
        )
        raise InputError(
            f"{path} is malformed ({where}): {str(value)[:40]!r} where {names} "
            "belongs; move it away."
        )


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
