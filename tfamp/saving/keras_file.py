"""Keras's quantizers: a `.keras` file, and such a file as a function."""

import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tfamp import keras_internals
from tfamp.saving import shares
from tfamp.saving.load import load_model
from tfamp.saving.quantizers import Made, layer_names


def write(
    model: keras.Model,
    specs: Any,
    folder: pathlib.Path,
    kind: str | None,
    keep: Sequence[str],
    outputs: int,
) -> Made:
    """A `.keras` file in float32, quantized by Keras where it is to be.

    Args:
        model: of any precision; stays as it is.
        specs: of its inputs.
        folder: to write in.
        kind: None, "int8" or "int4".
        keep: names or paths of layers that stay in float.
        outputs: how many it has.
    """
    file, target = folder / "source.keras", folder / "model.keras"
    model.save(file)
    copy = load_model(file, "float32", compile=False)
    names = layer_names(copy, keep)
    if kind:
        with warnings.catch_warnings():
            # Of each layer that has nothing to quantize.
            warnings.simplefilter("ignore")
            keras_internals.quantize(copy, kind, names)
    copy.save(target)
    loaded = load_model(target, compile=False)
    return Made(
        path=target,
        run=_of_flat(loaded, specs),
        outputs=[f"output_{i}" for i in range(outputs)],
        runtime=f"Keras {keras.__version__}",
        share=shares.of_keras(copy) if kind else None,
    )


def opened(path: str | os.PathLike) -> Callable[[Any], list[np.ndarray]]:
    """A `.keras` file as a function of a batch of inputs."""
    loaded = load_model(path, compile=False)

    def run(batch: Any) -> list[np.ndarray]:
        outputs = loaded(batch, training=False)
        return [np.asarray(each) for each in keras.tree.flatten(outputs)]

    return run


def _of_flat(loaded, specs):
    def run(rows):
        inputs = keras.tree.pack_sequence_as(specs, rows)
        outputs = loaded(inputs, training=False)
        return [np.asarray(each) for each in keras.tree.flatten(outputs)]

    return run
