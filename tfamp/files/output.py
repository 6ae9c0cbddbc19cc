"""Writing what a run or a command leaves: folders, whole files, numbers."""

import contextlib
import datetime
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from tfamp.errors import InputError

_told: set[pathlib.Path] = set()


def output_folder(output_dir: str | bytes | os.PathLike) -> pathlib.Path:
    """The folder as a path, checked before training and without a trace.

    Raises:
        InputError: It is no local path, no folder, or cannot be written.
    """
    try:
        output_dir = os.fsdecode(output_dir)
    except TypeError:
        raise InputError(
            f"output_dir={output_dir!r} is no path; pass a string or a "
            "pathlib.Path."
        ) from None
    if not output_dir or "\0" in output_dir:
        raise InputError(
            f"output_dir={output_dir!r} names no folder; pass the path of "
            "one, without null characters."
        )
    if "://" in output_dir:
        raise InputError(
            f"output_dir {output_dir!r} is not a local folder; expected "
            "a path on this machine."
        )
    folder = pathlib.Path(output_dir).expanduser().absolute()
    # Nothing is made yet: the run may still be turned down for another input.
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(
            f"output_dir {output_dir!r} cannot be made: {existing} is "
            "not a folder."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"output_dir {output_dir!r} cannot be written: no permission "
            f"in {existing}."
        )
    return folder


def make_folder(folder: pathlib.Path) -> None:
    """Makes the folder and its parents.

    Raises:
        InputError: The system refuses, for its own reasons.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Root passes every permission check, so only a write tells.
        probe = folder / ".tfamp-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"output_dir {str(folder)!r} cannot be written: "
            f"{error.strerror or error}."
        ) from error


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces a file's text: a reader, or a crash, sees the old or the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    # A link of that name would lead elsewhere.
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Replaces a file by a record as strict JSON; inf and NaN become null."""
    text = json.dumps(_finite(record), indent=1, allow_nan=False)
    write_atomically(path, text + "\n")


@contextlib.contextmanager
def said_and_done_without(path: pathlib.Path) -> Iterator[None]:
    """A log that cannot be written is no reason to stop training.

    Says so, once for each file.
    """
    try:
        yield
    except OSError as error:
        if path not in _told:
            _told.add(path)
            logging.warning(
                "%s cannot be written (%s); training goes on without.",
                path,
                error.strerror or error,
            )


def json_numbers(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The logs as JSON numbers, arrays as lists.

    JSON has no NaN and no inf: they become null.
    """
    return {name: _json_number(value) for name, value in logs.items()}


def utc_now() -> str:
    """The time as ISO 8601 in UTC with microseconds; sorts as text."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return now.isoformat(timespec="microseconds")


def _finite(value):
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _json_number(value):
    if np.ndim(value):
        return [_json_number(item) for item in value]
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
