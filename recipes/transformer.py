"""The block that the language recipes are made of: pre-norm, rotary, SwiGLU.

Built from Keras layers, one name each, so that every matrix product can be
found, quantized, or given low-rank weights from outside. Norms, rotations and
the softmax compute in float32, matrix products in the compute dtype.
"""

import keras
from keras import layers, ops

from tfamp.errors import InputError
from tfamp.layers import attention

# Of the slowest rotation (Su et al., 2021).
_LONGEST_WAVELENGTH = 10_000.0

# The hidden side of SwiGLU: with three kernels as many weights as a plain MLP
# of four times the width has with two (Shazeer, 2020).
_HIDDEN_PER_WIDTH = 8 / 3
_HIDDEN_MULTIPLE = 64


@keras.saving.register_keras_serializable(package="recipes")
class RotaryAttention(layers.Layer):
    """Scaled dot-product attention with rotary positions; has no weights.

    Positions enter by rotating pairs of features of queries and keys (Su et
    al., 2021, "RoFormer"), so that a product depends on the distance alone.
    The angles are computed in float32, in which every position is exact;
    bfloat16 holds no odd number above 256. The softmax is in float32 too, the
    two matrix products are in the compute dtype.

    Args:
        causal: whether a position sees itself and earlier ones only.
        name: of the layer.
        dtype: policy of the layer.

    Call arguments:
        query, key, value: [B, T, N, H], of N heads with H features each; H is
            even.
        padding_mask: bool [B, T], False where a key is padding; None where
            there is none.

    Returns:
        [B, T, N * H] in the compute dtype.
    """

    attend = staticmethod(attention.dot_product_attention)

    def __init__(
        self, causal: bool = True, name=None, dtype=None, trainable=True
    ):
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        self.causal = causal

    def call(self, query, key, value, padding_mask=None):
        if padding_mask is not None:
            padding_mask = padding_mask[:, None, None, :]
        attended = self.attend(
            rotate(query),
            rotate(key),
            value,
            mask=padding_mask,
            is_causal=self.causal,
        )
        batch, length, heads, features = ops.shape(attended)
        return ops.reshape(attended, (batch, length, heads * features))

    def get_config(self) -> dict:
        return super().get_config() | {"causal": self.causal}


def rotate(x):
    """Rotates pairs of features by angles that grow with the position.

    Feature i makes a pair with feature i + H/2, and turns by the position
    times 10000**(-2i/H).

    Args:
        x: [B, T, N, H]; H is even.

    Returns:
        The same shape and dtype; computed in float32.
    """
    half = x.shape[-1] // 2
    frequencies = _LONGEST_WAVELENGTH ** (
        -ops.arange(half, dtype="float32") / half
    )
    positions = ops.arange(ops.shape(x)[1], dtype="float32")
    angles = positions[:, None, None] * frequencies
    cos, sin = ops.cos(angles), ops.sin(angles)
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    rotated = ops.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return ops.cast(rotated, x.dtype)


def block(
    x,
    name: str,
    *,
    num_heads: int,
    num_blocks: int,
    causal: bool,
    padding_mask=None,
    dropout: float = 0.0,
    qk_norm: bool = False,
):
    """Attention and an MLP, each behind a norm and beside a shortcut.

    Args:
        x: [B, T, W]; a symbolic tensor.
        name: prefix of the layers' names.
        num_heads: divides W into even parts.
        num_blocks: how many such blocks the model has; the products that end
            in the shortcut start smaller by its square root (GPT-2).
        causal: whether a position sees itself and earlier ones only.
        padding_mask: bool [B, T], False for padding; None where there is none.
        dropout: share of the features that is dropped before each shortcut.
        qk_norm: whether queries and keys are normalized, which bounds the
            attention logits (Dehghani et al., 2023, "Scaling Vision
            Transformers to 22 Billion Parameters").

    Returns:
        [B, T, W].

    Raises:
        InputError: the width cannot be shared out to the heads.
    """
    width = x.shape[-1]
    check_heads(width, num_heads)
    output_scale = 1 / (2 * num_blocks)

    def heads(y, role):
        y = _dense(width, f"{name}_{role}")(y)
        y = layers.Reshape(
            (-1, num_heads, width // num_heads), name=f"{name}_{role}_heads"
        )(y)
        if qk_norm and role != "value":
            y = layers.RMSNormalization(name=f"{name}_{role}_norm")(y)
        return y

    def add(x, y, part):
        y = layers.Dropout(dropout, name=f"{name}_{part}_dropout")(y)
        return layers.Add(name=f"{name}_{part}_shortcut")([x, y])

    y = layers.RMSNormalization(name=f"{name}_attention_norm")(x)
    y = RotaryAttention(causal, name=f"{name}_attention")(
        heads(y, "query"),
        heads(y, "key"),
        heads(y, "value"),
        padding_mask=padding_mask,
    )
    y = _dense(width, f"{name}_attention_output", output_scale)(y)
    x = add(x, y, "attention")

    y = layers.RMSNormalization(name=f"{name}_mlp_norm")(x)
    hidden = _hidden_width(width)
    gate = _dense(hidden, f"{name}_mlp_gate", activation="silu")(y)
    up = _dense(hidden, f"{name}_mlp_up")(y)
    y = layers.Multiply(name=f"{name}_mlp_product")([gate, up])
    y = _dense(width, f"{name}_mlp_output", output_scale)(y)
    return add(x, y, "mlp")


def check_heads(width: int, num_heads: int) -> None:
    """Raises InputError where heads of an even width cannot be made."""
    if width % (2 * num_heads):
        multiple = 2 * num_heads
        raise InputError(
            f"width={width} is not divisible by num_heads={num_heads} into "
            f"even parts; use {max(round(width / multiple), 1) * multiple}."
        )


def _dense(units, name, scale=1.0, activation=None):
    return layers.Dense(
        units,
        activation=activation,
        use_bias=False,
        kernel_initializer=keras.initializers.VarianceScaling(scale, "fan_in"),
        name=name,
    )


def _hidden_width(width):
    multiples = round(_HIDDEN_PER_WIDTH * width / _HIDDEN_MULTIPLE)
    return max(multiples, 1) * _HIDDEN_MULTIPLE


def reversible_embedding() -> type[layers.Layer]:
    """The class of Keras whose layer is embedding and output at once."""
    found = getattr(layers, "ReversibleEmbedding", None)
    if found is None:
        raise InputError(
            f"Keras {keras.__version__} has no ReversibleEmbedding, of which "
            "this recipe is made; it came with 3.13: pip install 'keras>=3.13'."
        )
    return found
