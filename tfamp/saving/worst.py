"""The layer from which on a file computes something else than the model."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tfamp import keras_internals
from tfamp.saving import served
from tfamp.saving.agreement import agreement


def layer(
    model: keras.Model,
    specs: Any,
    rows: list[np.ndarray],
    opened: Callable[[keras.Model], Callable] | None,
    tolerance: float,
) -> str | None:
    """Finds it by exporting the model up to one layer after the other.

    A search by halves: what follows a wrong layer is taken to be wrong.

    Args:
        model: a functional or sequential one; None is found for others.
        specs: of its inputs.
        rows: that the file was run on.
        opened: exports a model and opens it.
        tolerance: as of the export.

    Returns:
        The name of the layer, or None where it cannot be found.
    """
    inputs = keras_internals.graph_inputs(model)
    if opened is None or inputs is None:
        return None
    parts = [
        (name, keras.Model(inputs, outputs))
        for name, outputs in keras_internals.graph_steps(model)
    ]
    low, high = 0, len(parts) - 1
    while low < high:
        middle = (low + high) // 2
        if _is_wrong(parts[middle][1], specs, rows, opened, tolerance):
            high = middle
        else:
            low = middle + 1
    return parts[low][0] if parts else None


def _is_wrong(part, specs, rows, opened, tolerance) -> bool:
    try:
        with served.computing(part, "float32"):
            expected = served.call(part, specs, rows)
        found = opened(part)(rows)
    except Exception:
        return True
    return not agreement(found, expected).relative_difference <= tolerance
