"""Keras layers whose sensitive step computes in float32, and no other.

`tfamp.keep_float32` turns layers of a model into these. A `.keras` file names
them as `tfamp>CLASS`, so the program that loads one imports this module first;
`import tfamp.precision.keep_float32` and any use of `tfamp.keep_float32` do.

Each layer takes and returns the dtype of the Keras layer that it stands for,
so that the matrix products before and after it stay in 16 bits.
"""

import keras
from keras import ops

from tfamp.files.saved_models import registered
from tfamp.keras_internals import sublayers

# Far below any logit and far from the smallest float32: after the subtraction
# a masked position has probability 0, and a fully masked row stays finite.
_MASKED_LOGIT_SHIFT = 1e9


@registered
class Float32Activation:
    """An activation that computes in float32 whatever the layer computes in.

    Args:
        activation: a Keras activation: a callable, a name or a config.
        cast_back: whether the result returns to the dtype of the input. A
            model's output stays in float32.
    """

    def __init__(self, activation, cast_back: bool = True):
        self.activation = keras.activations.get(activation)
        self.cast_back = cast_back

    def __call__(self, x):
        y = self.activation(_at_least_float32(x))
        # A cast tensor would lose the logits that Keras attaches to the result
        # of a softmax, and with them the exact cross-entropy of an output.
        return ops.cast(y, x.dtype) if self.cast_back else y

    def get_config(self) -> dict:
        return {
            "activation": keras.activations.serialize(self.activation),
            "cast_back": self.cast_back,
        }

    @classmethod
    def from_config(cls, config: dict) -> "Float32Activation":
        return cls(**config)


@registered
class Softmax(keras.layers.Softmax):
    """Softmax in float32, with the mask constant of float32 (-1e9)."""

    def call(self, inputs, mask=None):
        probabilities = super().call(_at_least_float32(inputs), mask)
        return ops.cast(probabilities, inputs.dtype)


@registered
class UnitNormalization(keras.layers.UnitNormalization):
    """Unit normalization whose sum of squares is taken in float32.

    In float16 it overflows from a norm of 256 on, and the output is 0.
    """

    def call(self, inputs):
        normalized = super().call(_at_least_float32(inputs))
        return ops.cast(normalized, inputs.dtype)


@registered
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """Multi-head attention with its softmax in float32 on both paths.

    Without dropout Keras uses `ops.dot_product_attention`, whose softmax is
    in float32 already. With dropout, with returned scores and with more than
    one attention axis it uses a `Softmax` sublayer. `build` creates that one
    anew whenever the layer is loaded, in the layer's own policy, which is why
    a policy set on the sublayer would not survive.
    """

    def build(self, query_shape, value_shape, key_shape=None):
        super().build(query_shape, value_shape, key_shape)
        _switch_softmax_sublayers(self)


@registered
class GroupedQueryAttention(keras.layers.GroupQueryAttention):
    """Grouped-query attention with its softmax in float32 on both paths."""

    def build(self, query_shape, value_shape, key_shape=None):
        super().build(query_shape, value_shape, key_shape)
        _switch_softmax_sublayers(self)


@registered
class Attention(keras.layers.Attention):
    """Dot-product attention with its softmax in float32."""

    def _apply_scores(self, scores, value, scores_mask=None, training=False):
        return _attend(self, scores, value, scores_mask, training)


@registered
class AdditiveAttention(keras.layers.AdditiveAttention):
    """Additive attention with its softmax in float32."""

    def _apply_scores(self, scores, value, scores_mask=None, training=False):
        return _attend(self, scores, value, scores_mask, training)


_FLOAT32_CLASS = {
    cls.__base__: cls
    for cls in (
        AdditiveAttention,
        Attention,
        GroupedQueryAttention,
        MultiHeadAttention,
        Softmax,
        UnitNormalization,
    )
}


def is_switched(layer: keras.layers.Layer) -> bool:
    """Whether a layer is one of this module's."""
    return type(layer) in _FLOAT32_CLASS.values()


def has_float32_step(layer: keras.layers.Layer) -> bool:
    """Whether a step of a layer is float32, and its result of 16 bits."""
    activation = getattr(layer, "activation", None)
    return is_switched(layer) or isinstance(activation, Float32Activation)


def switch(layer: keras.layers.Layer) -> bool:
    """Turns a Keras layer in place into its counterpart of this module.

    The layer object stays the same, with its weights, its name and its place
    in the graph of every model that holds it. A new layer would have to be
    put into each of them.

    Args:
        layer: any layer. A user's subclass is left alone: what it computes
            is unknown, and a file could not name the resulting class.

    Returns:
        Whether there is such a counterpart.
    """
    float32_class = _FLOAT32_CLASS.get(type(layer))
    if float32_class is None:
        return False
    layer.__class__ = float32_class
    _switch_softmax_sublayers(layer)
    return True


def _switch_softmax_sublayers(layer: keras.layers.Layer) -> None:
    for sublayer in sublayers(layer):
        if isinstance(sublayer, keras.layers.Softmax):
            switch(sublayer)


def _attend(layer, scores, value, scores_mask, training: bool):
    """The result `(B, Tq, dim)` and the weights `(B, Tq, Tv)`."""
    logits = _at_least_float32(scores)
    if scores_mask is not None:
        if len(scores_mask.shape) == 2:
            scores_mask = ops.expand_dims(scores_mask, axis=-2)
        logits = ops.where(scores_mask, logits, logits - _MASKED_LOGIT_SHIFT)
    # Back before the product, whose operands are to be of 16 bits.
    weights = ops.cast(ops.softmax(logits, axis=-1), scores.dtype)
    if training and layer.dropout > 0:
        weights = keras.random.dropout(
            weights, layer.dropout, seed=layer.seed_generator
        )
    return ops.matmul(weights, value), weights


def _at_least_float32(x):
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
