"""What steps return: numbers by name."""

from collections.abc import Mapping
from typing import Any


def flattened(logs: Any) -> dict[str, Any]:
    """Logs as Keras's history has them: those in dicts by their own names.

    `{m.name: m.result() for m in model.metrics}`, as Keras's guides write it,
    has all metrics of `compile` in one dict.
    """
    found: dict[str, Any] = {}
    if isinstance(logs, Mapping):
        for name, value in logs.items():
            is_inside = isinstance(value, Mapping)
            found |= flattened(value) if is_inside else {name: value}
    return found
