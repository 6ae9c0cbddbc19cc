"""Looks into a model while it runs: at layers, and at gradients between them.

A tap lets a tensor through as it is, and notes of it, and of the gradient that
comes back through it, `size_of`.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.precision.layer_paths import walk


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


class Taps:
    """The marks of all replicas; each runs the model in a thread of its own.

    Args:
        model: built.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._marks: dict[int, list[Mark]] = {}
        self._graphs: dict[int, Any] = {}

    def begin(self) -> list[Mark]:
        """Marks what this thread does from here on, in the order it happens.

        Tensors of inner graphs (the steps of a recurrent layer, the branches
        of a condition) are out of reach, and not marked.
        """
        thread = threading.get_ident()
        self._graphs[thread] = _graph_now()
        self._marks[thread] = []
        return self._marks[thread]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, layers go through the taps."""
        replaced = []
        for path, operation in _operations(self._model):
            is_quantized = getattr(operation, "quantization_mode", None)
            name = "quantized_call" if is_quantized else "call"
            call = self._tapped(path, getattr(operation, name))
            object.__setattr__(operation, name, call)
            replaced.append((operation, name))
        try:
            yield
        finally:
            for operation, name in replaced:
                object.__delattr__(operation, name)

    def _tapped(self, path: str, call):
        @functools.wraps(call)
        def tapped(*args, **kwargs):
            thread = threading.get_ident()
            if self._graphs.get(thread) is not _graph_now():
                return call(*args, **kwargs)
            marks = self._marks[thread]
            args, kwargs = keras.tree.map_structure(
                lambda each: _tap(each, path, "input", marks), (args, kwargs)
            )
            return keras.tree.map_structure(
                lambda each: _tap(each, path, "output", marks),
                call(*args, **kwargs),
            )

        return tapped


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


def _tap(value: Any, path: str, side: str, marks: list[Mark]) -> Any:
    """Lets a value through, whatever it is; marks floating tensors."""
    if isinstance(value, tf.RaggedTensor):
        return value.with_flat_values(
            _tap(value.flat_values, path, side, marks)
        )
    if isinstance(value, tf.SparseTensor):
        values = _tap(value.values, path, side, marks)
        return tf.SparseTensor(value.indices, values, value.dense_shape)
    if not isinstance(value, tf.Tensor) or not value.dtype.is_floating:
        return value
    mark = Mark(path, side, value.dtype.name, size_of(value))
    marks.append(mark)

    @tf.custom_gradient
    def through(x):
        def backward(gradient):
            mark.backward = size_of(gradient)
            return gradient

        return tf.identity(x), backward

    result = through(value)
    # It is an attribute of the Python object.
    keras_internals.attach_mask(result, keras_internals.mask_of(value))
    return result


def _graph_now() -> Any:
    """The graph that is being built; None where there is none."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _operations(model: keras.Model) -> Iterator[tuple[str, Any]]:
    """Layers, and what functional models compute without a layer."""
    models = [("", model)]
    for place in walk(model):
        yield place.path, place.layer
        models.append((f"{place.path}/", place.layer))
    for prefix, each in models:
        # Models that are no graph of operations have no such list.
        for operation in getattr(each, "operations", ()):
            if not isinstance(operation, keras.layers.Layer):
                yield f"{prefix}{operation.name}", operation
