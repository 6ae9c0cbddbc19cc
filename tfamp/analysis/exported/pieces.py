"""A metric on pieces of the data, from whatever computed the outputs."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp.errors import InputError
from tfamp.saving.agreement import agreement, joined

# What a test has to work with: the pieces of all data, at the least.
_PIECES = 40


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches to evaluate on, as arrays.

    Attributes:
        batches: of `(x, y, sample_weight)`, the last two None where there
            are none.
        rows: how many examples there are.
    """

    batches: list[tuple[Any, Any, Any]]
    rows: int


def read(dataset: tf.data.Dataset, steps: int | None) -> Data:
    """The first batches of a dataset.

    Raises:
        InputError: there is none.
    """
    batches = []
    for element in dataset if steps is None else dataset.take(steps):
        batches.append(
            keras.utils.unpack_x_y_sample_weight(
                keras.tree.map_structure(np.asarray, element)
            )
        )
    if not batches:
        raise InputError("The evaluation data ended before the first batch.")
    return Data(batches, sum(_rows_of(x) for x, _, _ in batches))


def of_model(model: keras.Model) -> Callable[[Any], list[np.ndarray]]:
    """A model as a function of a batch of inputs, which returns a flat list."""

    @tf.function(reduce_retracing=True)
    def call(x):
        return [
            tf.cast(y, tf.float32) if y.dtype.is_floating else y
            for y in keras.tree.flatten(model(x, training=False))
        ]

    return lambda x: [np.asarray(y) for y in call(_tensors(x))]


def outputs(run: Callable[[Any], list[np.ndarray]], data: Data) -> list[list]:
    """What a function makes of each batch."""
    return [run(x) for x, _, _ in data.batches]


def together(of_batches: list[list]) -> list[np.ndarray]:
    """The outputs of all batches."""
    return joined(of_batches)


def has_metric(model: keras.Model) -> bool:
    """Whether a model's metrics follow from its outputs."""
    return (
        model.compiled
        and type(model).test_step is keras.Model.test_step
        and type(model).call is not keras.Model.call
    )


def values(
    model: keras.Model, data: Data, of_batches: list[list]
) -> dict[str, list[float]]:
    """Loss and metrics of each piece of the data.

    Args:
        model: compiled, whose loss and metrics they are; `has_metric`.
        data: what the outputs are of.
        of_batches: from `outputs`.
    """
    found: dict[str, list[float]] = {}
    structure = _structure(model, data)
    pieces = max(1, -(-_PIECES // len(data.batches)))
    for batch, flat in zip(data.batches, of_batches, strict=True):
        y_pred = keras.tree.pack_sequence_as(structure, flat)
        for begin, end in _cuts(_rows_of(batch[0]), pieces):
            parts = [_cut(part, begin, end) for part in (*batch, y_pred)]
            for name, value in _metrics(model, *parts).items():
                found.setdefault(name, []).append(value)
    model.reset_metrics()
    return found


def compared(of_batches: list[list], reference: list[list]):
    """How the outputs of all batches differ from others."""
    return agreement(together(of_batches), together(reference))


def _metrics(model, x, y, weights, y_pred) -> dict[str, float]:
    x, y, weights = (_tensors(part) for part in (x, y, weights))
    y_pred = _tensors(y_pred)
    model.reset_metrics()
    loss = model.compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=weights, training=False
    )
    results = model.compute_metrics(
        x=x, y=y, y_pred=y_pred, sample_weight=weights
    )
    flat = {
        name: float(value)
        for name, value in results.items()
        if np.ndim(value) == 0
    }
    return flat | {"loss": float(loss)}


def _cut(structure, begin, end):
    """Rows of all arrays in a structure."""
    if structure is None:
        return None
    return keras.tree.map_structure(
        lambda x: x[begin:end] if np.ndim(x) else x, structure
    )


def _structure(model, data):
    x = data.batches[0][0]
    inputs = keras.tree.map_structure(lambda a: a[:1] if a.ndim else a, x)
    return keras.tree.map_structure(
        lambda _: 0, model(_tensors(inputs), training=False)
    )


def _tensors(structure):
    if structure is None:
        return None
    return keras.tree.map_structure(tf.convert_to_tensor, structure)


def _rows_of(x) -> int:
    return next((len(a) for a in keras.tree.flatten(x) if np.ndim(a)), 1)


def _cuts(rows: int, pieces: int) -> Iterator[tuple[int, int]]:
    pieces = min(pieces, rows)
    for i in range(pieces):
        yield rows * i // pieces, rows * (i + 1) // pieces


def mean(values: Iterable[float]) -> float:
    """Of a metric over the pieces."""
    return float(np.mean(list(values)))
