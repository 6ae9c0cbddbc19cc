"""The way of a tensor forward, and of its gradient back."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals


def with_gradient_seen(
    value: tf.Tensor, see: Callable[[Any], None]
) -> tf.Tensor:
    """The value as it is; the gradient that comes back to it is seen.

    Args:
        value: of a floating dtype.
        see: gets the gradient, a tensor or `tf.IndexedSlices`, while it is
            being computed; it goes on as it is. Not called where none comes.
    """

    @tf.custom_gradient
    def identity(x):
        def backward(gradient):
            see(gradient)
            return gradient

        return tf.identity(x), backward

    result = identity(value)
    # It is an attribute of the Python object.
    keras_internals.attach_mask(result, keras_internals.mask_of(value))
    return result


def map_floats(
    function: Callable[[int, int, tf.Tensor], tf.Tensor], structure: Any
) -> Any:
    """A structure whose floating tensors went through a function.

    What is no tensor stays as it is. So does, within a graph, an eager tensor,
    a constant that a model holds and may look into: the function gets a copy
    of it, and what it returns is not used.

    Args:
        function: gets the number of a leaf, how many there are, and the
            tensor; of a ragged or sparse tensor its values.
        structure: any. It comes back itself where nothing changes.
    """
    leaves = keras.tree.flatten(structure)
    mapped = [
        _through(functools.partial(function, i, len(leaves)), leaf)
        for i, leaf in enumerate(leaves)
    ]
    if all(after is leaf for after, leaf in zip(mapped, leaves, strict=True)):
        return structure
    return keras.tree.pack_sequence_as(structure, mapped)


def graph_now() -> Any:
    """The graph that is being built; None where there is none."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _through(function: Callable[[tf.Tensor], tf.Tensor], value: Any) -> Any:
    if isinstance(value, tf.RaggedTensor):
        flat = _through(function, value.flat_values)
        is_same = flat is value.flat_values
        return value if is_same else value.with_flat_values(flat)
    if isinstance(value, tf.SparseTensor):
        values = _through(function, value.values)
        if values is value.values:
            return value
        return tf.SparseTensor(value.indices, values, value.dense_shape)
    if not isinstance(value, tf.Tensor) or not value.dtype.is_floating:
        return value
    if graph_now() is not None and hasattr(value, "numpy"):
        function(tf.identity(value))
        return value
    return function(value)
