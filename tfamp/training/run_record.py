"""`run.json`: what ran, on what, with which versions, and how it ended."""

import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tfamp.files import command_line
from tfamp.files.output import (
    json_numbers,
    make_folder,
    output_folder,
    said_and_done_without,
    utc_now,
    write_atomically,
)
from tfamp.precision.policy import precision_of
from tfamp.version import __version__

SCHEMA = "tfamp.run/1"


class RunRecord(keras.callbacks.Callback):
    """Keeps `run.json` in the output folder, from the first step to the end.

    It holds `schema`, `recipe` (the module or file that holds the config's
    class; null without one), `command`, `precision` (what its layers compute
    in), `strategy`,
    `replicas`, `versions`, `hardware`, `config`, `git` (commit and whether
    tracked files differ from it, of the checkout that holds the config's
    class; null outside one), `start_time` and `end_time` (UTC, ISO 8601),
    `final_metrics`, `exit_reason`. While `exit_reason` is null the run is
    under way, or its process was killed. A later run into the same folder
    replaces the record.

    Keras tells callbacks nothing when training raises: `end_run` completes
    the record then, and `tfamp.recipe.main` calls it.

    Args:
        output_dir: A local folder; made when training begins.
        config: The run's settings, a dataclass or a mapping.

    Raises:
        InputError: `output_dir` cannot be written.
    """

    def __init__(self, output_dir: str | os.PathLike, config: Any = None):
        super().__init__()
        self._path = output_folder(output_dir) / "run.json"
        self._config = config
        self._final_metrics: dict[str, Any] = {}

    def on_train_begin(self, logs=None):
        make_folder(self._path.parent)
        import tensorflow as tf

        from tfamp.hardware.devices import detect_hardware

        strategy = self.model.distribute_strategy
        record = {
            "schema": SCHEMA,
            "recipe": _recipe_name(self._config),
            "command": command_line.written(),
            "precision": precision_of(self.model),
            "strategy": type(strategy).__name__.lstrip("_"),
            "replicas": strategy.num_replicas_in_sync,
            "versions": {
                "python": platform.python_version(),
                "tensorflow": tf.__version__,
                "keras": keras.__version__,
                "numpy": np.__version__,
                "tfamp": __version__,
            },
            "hardware": dataclasses.asdict(detect_hardware()),
            "config": _as_dict(self._config),
            "git": _git_state(_source_folder(self._config)),
            "start_time": utc_now(),
            "end_time": None,
            "final_metrics": None,
            "exit_reason": None,
        }
        _write_json(self._path, record)

    def on_epoch_end(self, epoch, logs=None):
        self._final_metrics = dict(logs or {})

    def on_train_end(self, logs=None):
        end_run(self._path.parent, "finished", self._final_metrics)


def end_run(
    output_dir: str | os.PathLike,
    exit_reason: str,
    final_metrics: Mapping[str, float] | None = None,
    started_since: str = "",
) -> None:
    """Completes `run.json`; does nothing where no run was recorded.

    Args:
        output_dir: The folder that `RunRecord` writes to.
        exit_reason: "finished", "interrupted", or the error in one line.
        final_metrics: Replaces the recorded ones; None keeps them.
        started_since: Leaves a record alone whose `start_time` lies before
            this time (as `utc_now` writes it): it is another run's.
    """
    path = pathlib.Path(output_dir).expanduser() / "run.json"
    record = _read_record(path)
    if record is None or record["start_time"] < started_since:
        return
    record["end_time"] = utc_now()
    record["exit_reason"] = exit_reason
    if final_metrics is not None:
        record["final_metrics"] = json_numbers(final_metrics)
    _write_json(path, record)


def end_phases(
    output_dir: str | os.PathLike, exit_reason: str, started_since: str
) -> None:
    """Completes the records in sub-folders that have no end yet.

    A recipe of several phases, such as pretraining, has one in each. The args
    are those of `end_run`.
    """
    for path in pathlib.Path(output_dir).expanduser().glob("*/run.json"):
        record = _read_record(path)
        if record is not None and record["exit_reason"] is None:
            end_run(path.parent, exit_reason, started_since=started_since)


def _read_record(path):
    """The record; None where there is none, or the file is another tool's."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(record, dict) and record.get("schema") == SCHEMA
    return record if ours else None


def _write_json(path, record):
    # Paths and dtypes, which a user's config may hold, become their text.
    text = json.dumps(record, indent=2, default=str) + "\n"
    with said_and_done_without(path):
        write_atomically(path, text)


def _as_dict(config):
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return dict(config or {})


def _recipe_name(config):
    source = _source(config)
    if source is None:
        return None
    spec = sys.modules[type(config).__module__].__spec__
    # A file that was run, or that `load_recipe` imported, has no name to
    # import it by.
    if spec is None or spec.name.startswith("tfamp_recipe_"):
        return source.name
    return spec.name


def _source_folder(config):
    source = _source(config)
    return source.absolute().parent if source else pathlib.Path.cwd()


def _source(config):
    """The file of a config's class; None for a mapping or nothing."""
    module = sys.modules.get(type(config).__module__)
    file = getattr(module, "__file__", None)
    is_config = dataclasses.is_dataclass(config)
    return pathlib.Path(file) if is_config and file else None


def _git_state(folder):
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    # Untracked files do not count, as in `git describe --dirty`: an output
    # folder inside the checkout would make every run dirty.
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "dirty": None if changes is None else changes != "",
    }


def _git(folder, *arguments):
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
