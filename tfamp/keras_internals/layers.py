"""What layers hold, and what they keep of a call."""

import contextlib
from collections.abc import Iterator, Sequence

import keras
from packaging.version import Version

# The cell of `ConvLSTM1D` and its like, which has no public name.
ConvLSTMCell = keras.src.layers.rnn.conv_lstm.ConvLSTMCell

# Keras 3.10 has it in the dtype of its input.
RMS_NORMALIZATION_IS_FLOAT32 = Version(keras.__version__) >= Version("3.11")


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that a layer holds itself, not those that they hold.

    `Model.layers` is public, but a layer that is no model has no such list.
    """
    return layer._flatten_layers(include_self=False, recursive=False)


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The model and all layers in it, at any depth, each once."""
    return model._flatten_layers()


def renormalizes(layer: keras.layers.BatchNormalization) -> bool:
    """Whether it renormalizes batches, which Keras before 3.14 never does."""
    return getattr(layer, "renorm", False)


def add_state(
    layer: keras.layers.Layer, name: str, shape: tuple[int, ...]
) -> keras.Variable:
    """Adds float32 zeros to a built layer, whose "gradient" is the next value.

    Replicas must agree on that before it is assigned.
    """
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        variable = layer.add_weight(
            name=name,
            shape=shape,
            initializer="zeros",
            dtype="float32",
            autocast=False,
            aggregation="only_first_replica",
        )
    finally:
        if was_locked:
            layer._tracker.lock()
    variable.overwrite_with_gradient = True
    # As if the layer were being built, within what holds it.
    variable._path = f"{layer.path}/{name}"
    return variable


def overwrites_with_gradient(variable: keras.Variable) -> bool:
    """Whether the variable's "gradient" is its next value (float8 scales)."""
    return getattr(variable, "overwrite_with_gradient", False)


def mask_of(tensor):
    """The mask that a layer attached to its output, or None.

    It is an attribute of the Python object, so that a `tf.function` loses it.
    """
    return getattr(tensor, "_keras_mask", None)


def attach_mask(tensor, mask) -> None:
    """Attaches a mask as a layer would."""
    if mask is not None:
        tensor._keras_mask = mask


@contextlib.contextmanager
def additional_losses_kept(
    layers: Sequence[keras.layers.Layer],
) -> Iterator[None]:
    """Gives back what `add_loss` recorded before, and not what it did within.

    A call of a layer clears the losses of the call before.
    """
    before = [(each, each._losses[:], set(each._loss_ids)) for each in layers]
    try:
        yield
    finally:
        for each, losses, ids in before:
            each._losses[:] = losses
            each._loss_ids.clear()
            each._loss_ids.update(ids)
