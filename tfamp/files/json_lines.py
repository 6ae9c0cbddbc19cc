"""Files of JSON lines that grow while a run goes on, and survive its death."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from tfamp.errors import InputError
from tfamp.files.output import write_atomically


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects in the file; none where there is no file.

    Text after the last line end was never finished, and is left out.

    Raises:
        InputError: a line is no JSON object.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    try:
        return [dict(json.loads(line)) for line in lines]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not a log of JSON lines ({error}); move it away or "
            "choose another output_dir."
        ) from error


def repair_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Takes half a line off the end, which a lost machine can leave there.

    Returns:
        What `read_json_lines` does.

    Raises:
        InputError: a line is no JSON object; the file stays as it is.
    """
    rows = read_json_lines(path)
    if path.exists():
        write_atomically(path, "".join(map(_line, rows)))
    return rows


def append_json_line(path: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Writes one object, on disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(_line(row))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
