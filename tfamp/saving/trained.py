"""A recipe's model with the weights of a training."""

import os
import pathlib
from typing import Any

import keras

from tfamp import keras_internals
from tfamp.checkpoint.store import Checkpoints
from tfamp.errors import InputError
from tfamp.saving.load import load_model
from tfamp.training import safe


def restore(
    model: keras.Model, path: str | os.PathLike, element_spec: Any = None
) -> None:
    """Gives a model the weights of a file or of a folder of checkpoints.

    Args:
        model: built and compiled, of any precision.
        path: what `model.save` or `model.save_weights` wrote, or the
            `checkpoint_dir` of a training, of which the newest counts.
        element_spec: of its batches; a `checkpoint_dir` holds metrics too,
            which are made by them.

    Raises:
        InputError: there is nothing, or it is of another model.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        _restore_newest(model, path, element_spec)
        return
    if not os.path.exists(path):
        raise InputError(f"Checkpoint {path!r} is not there.")
    if path.endswith(".weights.h5"):
        try:
            model.load_weights(path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path!r} is of another model than the recipe's: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        return
    weights = load_model(path, compile=False).get_weights()
    expected = [tuple(each.shape) for each in model.weights]
    found = [each.shape for each in weights]
    if found != expected:
        raise InputError(
            f"{path!r} is of another model than the recipe's: its {len(found)} "
            f"weights have other shapes than the recipe's {len(expected)}; set "
            "the flags that it was trained with."
        )
    model.set_weights(weights)


def _restore_newest(model, folder: str, element_spec) -> None:
    nothing = InputError(
        f"{folder!r} holds no checkpoint; expected the checkpoint_dir of a "
        "training, or a .keras or .weights.h5 file."
    )
    # Before it is opened to be written, which asks for an empty one.
    if not any(pathlib.Path(folder).glob("ckpt-*.index")):
        raise nothing
    if element_spec is not None:
        is_custom = type(model).train_step is not keras.Model.train_step
        with model.distribute_strategy.scope():
            safe.build_layers(model, element_spec, is_custom)
            safe.build_rest(model, element_spec, is_custom)
    keras_internals.build_optimizer(model)
    if Checkpoints(model, folder).restore() is None:
        raise nothing
