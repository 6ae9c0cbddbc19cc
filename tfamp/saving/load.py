"""Loading a `.keras` file that names tfamp's own classes."""

import os
import zipfile

import keras

from tfamp.errors import InputError

# Imported for what they register: Keras looks up the classes of a file by
# the names under which modules registered them.
from tfamp.layers import float8_counterparts, optimize
from tfamp.precision import float32_layers, kept_layers
from tfamp.scaling import optimizer

_REGISTERED = (
    float8_counterparts.LAYERS,
    optimize.optimize,
    float32_layers.Float32Activation,
    kept_layers.keep,
    optimizer.LossScaleOptimizer,
)


def load_model(path: str | os.PathLike, *, compile: bool = True) -> keras.Model:
    """Loads a model that `model.save` wrote, whatever tfamp made of it.

    The same as `keras.saving.load_model` once tfamp's layers and optimizer
    are imported. Nothing in the file is executed or unpickled.

    Args:
        path: a `.keras` file.
        compile: whether to compile it as it was, with the optimizer's state.

    Returns:
        The model.

    Raises:
        InputError: the file is not there, or is no `.keras` file.
    """
    if not zipfile.is_zipfile(path):
        found = "is no .keras file" if os.path.exists(path) else "is not there"
        raise InputError(
            f"{os.fspath(path)!r} {found}; expected what model.save() wrote."
        )
    return keras.saving.load_model(path, compile=compile, safe_mode=True)
