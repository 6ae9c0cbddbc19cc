"""A model's precision as it was, to put it back."""

import dataclasses
from collections.abc import Iterable

import keras

from tfamp import keras_internals
from tfamp.precision import kept_layers
from tfamp.precision.product_policy import policy_of


@dataclasses.dataclass(frozen=True)
class _Layer:
    layer: keras.layers.Layer
    cls: type
    policy: keras.dtype_policies.DTypePolicy
    activation: object
    is_open: bool
    input_dtype: str | None


def remember(layers: Iterable[keras.layers.Layer]) -> list[_Layer]:
    """Remembers what `keep_float32` may change of layers."""
    return [
        _Layer(
            layer,
            type(layer),
            policy_of(layer),
            vars(layer).get("activation"),
            kept_layers.is_open(layer),
            keras_internals.input_dtype(layer),
        )
        for layer in layers
    ]


def put_back(remembered: Iterable[_Layer]) -> None:
    """Gives layers back what they had."""
    for each in remembered:
        layer = each.layer
        if kept_layers.is_open(layer) and not each.is_open:
            kept_layers.release(layer)
        layer.__class__ = each.cls
        if each.input_dtype is not None:
            keras_internals.set_input_dtype(layer, each.input_dtype)
        if policy_of(layer) != each.policy:
            layer.dtype_policy = each.policy
            if isinstance(layer, keras.layers.Normalization) and layer.built:
                restate_constants(layer)
        if vars(layer).get("activation") is not each.activation:
            layer.activation = each.activation


def restate_constants(layer: keras.layers.Normalization) -> None:
    """Casts mean and variance anew, from what they were given in."""
    if layer.input_mean is None:
        layer.finalize_state()
    elif layer.built:
        layer.build(layer.get_build_config()["input_shape"])
