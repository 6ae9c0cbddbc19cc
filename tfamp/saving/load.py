"""Loading a `.keras` file that names tfamp's own classes."""

import os
import shutil
import tempfile
import zipfile

import keras

from tfamp import keras_internals
from tfamp.errors import InputError

# Imported for what they register: Keras looks up the classes of a file by
# the names under which modules registered them.
from tfamp.layers import float8_counterparts, optimize
from tfamp.precision import float32_layers, kept_layers
from tfamp.precision.keep_float32 import keep_float32
from tfamp.precision.policy import (
    PRECISIONS,
    precision_scope,
    resolve_precision,
)
from tfamp.saving import recast
from tfamp.scaling import optimizer

_REGISTERED = (
    float8_counterparts.LAYERS,
    optimize.optimize,
    float32_layers.Float32Activation,
    kept_layers.keep,
    optimizer.LossScaleOptimizer,
)


def load_model(
    path: str | os.PathLike,
    precision: str | None = None,
    *,
    compile: bool = True,
) -> keras.Model:
    """Loads a model that `model.save` wrote, whatever tfamp made of it.

    Without a precision the same as `keras.saving.load_model` once tfamp's
    layers and optimizer are imported. Nothing in the file is executed or
    unpickled.

    Args:
        path: a `.keras` file.
        precision: to compute in, whatever the file was saved in; as in
            `tfamp.set_precision`. None for that of the file. Weights and
            moments are float32 in each, and come back bit for bit; those that
            the file has in 16 bits, as frozen ones, become float32 with the
            same values, but in the mixed precision that the file is in. The
            loss scale begins anew where the file has none. What 16 bits would
            spoil is kept in float32.
        compile: whether to compile it as it was, with the optimizer's state.

    Returns:
        The model.

    Raises:
        InputError: the file is not there, is no `.keras` file, or has layers
            whose precision cannot be changed; the precision is unknown.
    """
    if not zipfile.is_zipfile(path):
        found = "is no .keras file" if os.path.exists(path) else "is not there"
        raise InputError(
            f"{os.fspath(path)!r} {found}; expected what model.save() wrote."
        )
    if precision is None:
        return keras.saving.load_model(path, compile=compile, safe_mode=True)
    precision = resolve_precision(precision)
    if precision not in PRECISIONS:
        raise InputError(
            f"A file cannot be loaded in {precision}; load it in one of "
            f"{', '.join(PRECISIONS)}, and then call tfamp.{precision}(model)."
        )
    return _load_in(path, precision, compile)


def _load_in(path, precision, compile):
    scale = optimizer.LossScaleOptimizer(keras.optimizers.SGD()).initial_scale
    with (
        # Layers that a model's own code makes have no policy in the file.
        precision_scope(precision),
        tempfile.TemporaryDirectory() as folder,
    ):
        # Keras takes a path alone.
        recast_file = os.path.join(folder, "model.keras")
        with open(recast_file, "wb") as target:
            shutil.copyfileobj(recast.recast(path, precision, scale), target)
        model = keras.saving.load_model(
            recast_file, compile=compile, safe_mode=True
        )
    if precision != "float32" and model.built:
        keep_float32(model)
    for scaler in _scalers(model):
        # A scale that moved in the file goes on from where it was.
        if not scaler.dynamic or scaler.dynamic_scale == 1.0:
            scaler.dynamic_scale.assign(scaler.initial_scale)
    return model


def _scalers(model) -> list[optimizer.LossScaleOptimizer]:
    """Of the model, and those that it or a layer of it trains itself with."""
    held = [
        value
        for holder in [model, *keras_internals.all_layers(model)]
        for value in vars(holder).values()
    ]
    held.append(model.optimizer if model.compiled else None)
    return [
        each
        for each in held
        if isinstance(each, optimizer.LossScaleOptimizer) and each.built
    ]
