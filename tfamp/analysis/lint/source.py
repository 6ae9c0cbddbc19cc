"""Where in somebody's own code an operation of a traced graph was made."""

import os
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Code of nobody who could change it.
_LIBRARIES = ("keras", "tensorflow", "tfamp", "absl")
_ANALYSIS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def line_of(operation: tf.Operation) -> str:
    """ "file.py:12"; "" where no own code made it."""
    for frame in _own_frames(operation):
        return f"{os.path.relpath(frame.filename)}:{frame.lineno}"
    return ""


def _own_frames(operation: tf.Operation) -> Iterator[Any]:
    for frame in reversed(list(operation.traceback or ())):
        name = frame.filename
        if name.startswith(_ANALYSIS):
            # From here on it is whoever asked for the report.
            return
        plain = name.replace(os.sep, "/")
        is_library = "/lib/python" in plain or any(
            f"/{library}/" in plain for library in _LIBRARIES
        )
        if not is_library and not name.startswith("<"):
            yield frame
