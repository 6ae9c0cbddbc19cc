"""Keras's quantizers: a `.keras` file, and such a file as a function."""

import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tfamp import keras_internals
from tfamp.precision.layer_paths import choose, walk
from tfamp.saving import shares
from tfamp.saving.load import load_model
from tfamp.saving.quantizers import Made


def write(
    model: keras.Model,
    specs: Any,
    folder: pathlib.Path,
    kind: str | None,
    keep: Sequence[str],
    outputs: int,
    calibration: Sequence[list[np.ndarray]] = (),
) -> Made:
    """A `.keras` file in float32, quantized by Keras where it is to be.

    Args:
        model: of any precision; stays as it is.
        specs: of its inputs.
        folder: to write in.
        kind: None, "int8", "int4" or "gptq".
        keep: names or paths of layers that stay in float.
        outputs: how many it has.
        calibration: batches of inputs, flat, that GPTQ fits the kernels to.
    """
    file, target = folder / "source.keras", folder / "model.keras"
    model.save(file)
    copy = load_model(file, "float32", compile=False)
    if kind:
        trial = load_model(file, "float32", compile=False)
        # Of any kind: what is asked is what a file would bring back.
        _quantize(trial, "int8", _kept(trial, keep))
        lost = keras_internals.lost_at_saving(trial)
        layers = keras_internals.all_layers(copy)
        kept = [*_kept(copy, keep), *(layers[i] for i in lost)]
        run = _of_flat(copy, specs)
        _quantize(copy, kind, kept, lambda: [run(x) for x in calibration])
    with keras_internals.saved_whole(copy):
        copy.save(target)
    loaded = load_model(target, compile=False)
    return Made(
        path=target,
        run=_of_flat(loaded, specs),
        outputs=[f"output_{i}" for i in range(outputs)],
        runtime=f"Keras {keras.__version__}",
        share=shares.of_keras(copy) if kind else None,
    )


def _kept(model, keep) -> list[keras.layers.Layer]:
    """The layers that were named, and those in them."""
    if not keep:
        return []
    chosen = choose(walk(model), list(keep))
    return [
        each for layer in chosen for each in keras_internals.all_layers(layer)
    ]


def _quantize(model, kind, kept, run=None) -> None:
    with warnings.catch_warnings():
        # Of each layer that has nothing to quantize.
        warnings.simplefilter("ignore")
        if kind == "gptq":
            keras_internals.quantize_with_gptq(model, kept, run)
        else:
            keras_internals.quantize(model, kind, kept)


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
