"""What blame notes of a step: the sizes of what passes, there and back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfamp.taps.parts import Spot
from tfamp.taps.passing import with_gradient_seen


@dataclasses.dataclass
class Mark:
    """A tensor that went into or came out of a layer.

    Attributes:
        layer: path of the layer, as `layer_paths.walk` has it.
        side: "input" or "output".
        dtype: name of the tensor's dtype.
        forward: the tensor's size, of `size_of`.
        backward: that of the gradient that came back, where one did.
    """

    layer: str
    side: str
    dtype: str
    forward: tf.Tensor
    backward: tf.Tensor | None = None


def marking(marks: list[Mark]) -> Callable[[Spot, tf.Tensor], tf.Tensor]:
    """What taps are told: marks what passes, in the order it happens."""

    def see(spot: Spot, value: tf.Tensor) -> tf.Tensor:
        path, dtype = spot.part.path, value.dtype.name
        mark = Mark(path, spot.side, dtype, size_of(value))
        marks.append(mark)

        def see_gradient(gradient) -> None:
            mark.backward = size_of(gradient)

        return with_gradient_seen(value, see_gradient)

    return see


def size_of(value: Any) -> tf.Tensor:
    """The largest magnitude in it: float64 scalar, not finite if any is not.

    -inf of an empty tensor. Few operations, since a model has many tensors.

    Args:
        value: a tensor or `tf.IndexedSlices` of a floating dtype.
    """
    if isinstance(value, tf.IndexedSlices):
        value = value.values
    # TensorFlow's maximum of a NaN and something is NaN.
    largest = tf.reduce_max(tf.abs(tf.convert_to_tensor(value)))
    return tf.cast(largest, tf.float64)
