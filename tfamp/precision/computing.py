"""A model that computes in another precision for a while."""

import contextlib
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.precision.product_policy import product_dtype

_DTYPES_16 = ("bfloat16", "float16")


@contextlib.contextmanager
def computing_in(
    policy: str, layers: Sequence[keras.layers.Layer]
) -> Iterator[None]:
    """Within it the layers compute in another precision.

    Their weights stay what they are. What a layer computes in beside its
    policy, as the `reverse_dtype` of an embedding, goes with it.
    """
    new = keras.dtype_policies.get(policy)
    with (
        _dtypes_beside_replaced(layers, new.compute_dtype),
        keras_internals.dtype_policy_replaced(list(layers), new),
    ):
        yield


@contextlib.contextmanager
def all_in_float32(model: keras.Model) -> Iterator[None]:
    """Within it all that a model says of 16 bits is said of float32.

    That is, beside policies: casts that are part of a functional model, the
    dtypes of its inputs, and weights that are stored in 16 bits, which are
    others within it: nothing may be trained.
    """
    layers = keras_internals.all_layers(model)
    functional = [each for each in layers if isinstance(each, _WITH_GRAPH)]
    operations = [
        operation
        for each in functional
        for operation in keras_internals.graph_operations(each)
        if not isinstance(operation, keras.layers.Layer)
    ]
    with (
        computing_in("float32", layers_in_16_bits(model)),
        _dtypes_beside_replaced(operations, "float32"),
        keras_internals.input_dtypes_replaced(
            functional, dict.fromkeys(_DTYPES_16, "float32")
        ),
        keras_internals.values_replaced(
            {
                id(variable): variable
                for layer in layers
                for variable in layer.variables
                if variable.dtype in _DTYPES_16
            }.values(),
            "float32",
        ),
    ):
        yield


_WITH_GRAPH = (keras.Sequential, keras_internals.Functional)


def layers_in_16_bits(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers and models that compute, or multiply, in 16 bits."""
    return [
        layer
        for layer in keras_internals.all_layers(model)
        if layer.compute_dtype in _DTYPES_16
        or product_dtype(layer) is not None
        or _dtypes_beside(layer)
    ]


@contextlib.contextmanager
def _dtypes_beside_replaced(owners: Sequence, dtype: str) -> Iterator[None]:
    beside = [
        (vars(owner), name, vars(owner)[name])
        for owner in owners
        for name in _dtypes_beside(owner)
    ]
    for attributes, name, _ in beside:
        # Past Layer.__setattr__, which tracks what it is given.
        attributes[name] = dtype
    try:
        yield
    finally:
        for attributes, name, value in beside:
            attributes[name] = value


def _dtypes_beside(owner: object) -> list[str]:
    """Attributes that say of 16 bits, beside the layer's policy."""
    return [
        name
        for name, value in vars(owner).items()
        if name.endswith("dtype")
        and isinstance(value, (str, tf.DType))
        and _is_16_bits(value)
    ]


def _is_16_bits(dtype) -> bool:
    try:
        return tf.as_dtype(dtype).name in _DTYPES_16
    except TypeError:
        return False
