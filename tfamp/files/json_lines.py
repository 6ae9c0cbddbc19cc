"""Files of JSON lines that grow while a run goes on, and survive its death."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from tfamp.errors import InputError


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects in the file; none where there is no file.

    Text after the last line end was never finished, and is left out.

    Raises:
        InputError: a line is no JSON object.
    """
    if not path.exists():
        return []
    number = 0
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        rows = []
        for line in lines:
            number += 1
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"not an object: {line[:40]}")
            rows.append(row)
    except (OSError, RecursionError, ValueError) as error:
        where = f"line {number}: " if number else ""
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} is not a log of JSON lines ({where}{reason}); move it "
            "away or choose another output_dir."
        ) from error
    return rows


def repair_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Takes half a line off the end, which a lost machine can leave there.

    Returns:
        What `read_json_lines` does.

    Raises:
        InputError: a line is no JSON object; the file stays as it is.
    """
    rows = read_json_lines(path)
    if path.exists():
        end = path.read_bytes().rfind(b"\n") + 1
        # What is cut off needs no room on a full disk.
        if end < path.stat().st_size:
            os.truncate(path, end)
    return rows


def append_json_line(path: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Writes one object, on disk when this returns, or nothing of it.

    Raises:
        OSError: as the system has it, for a full disk or the like.
    """
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        line = _line(row).encode()
        try:
            # A disk that fills up takes the beginning.
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)
            raise


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
