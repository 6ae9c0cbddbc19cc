"""The U-Net of the diffusion recipe: residual blocks that know the time."""

import math

import keras
from keras import layers, ops

GROUPS = 8
_HEAD_WIDTH = 32

# Time 0 to 1 as positions, and the longest of their wavelengths (Ho et al.,
# 2020, "Denoising Diffusion Probabilistic Models").
_POSITIONS = 1000.0
_LONGEST_WAVELENGTH = 10_000.0


@keras.saving.register_keras_serializable(package="tfamp_recipes")
class TimeEmbedding(layers.Layer):
    """Sines and cosines of the time, from fast ones to slow ones.

    Computed in float32 in every precision, and so is its output. The fastest
    turn through 1000 radians, where numbers of float16 are 0.5 apart and those
    of bfloat16 are 4 apart: the sine of such an angle is anything.

    Args:
        width: of the output; even.
        name: of the layer.
        dtype: float32.

    Call arguments:
        time: [B], float32 from 0 to 1.

    Returns:
        [B, width].
    """

    def __init__(self, width: int, name=None, dtype="float32"):
        super().__init__(name=name, dtype=dtype)
        self.width = width

    def call(self, time):
        half = self.width // 2
        exponents = ops.arange(half, dtype="float32") / half
        frequencies = _LONGEST_WAVELENGTH**-exponents
        angles = _POSITIONS * time[:, None] * frequencies
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)

    def get_config(self) -> dict:
        config = super().get_config()
        return {
            "name": config["name"],
            "dtype": config["dtype"],
            "width": self.width,
        }


def denoiser(
    image_shape: tuple[int, int, int],
    num_classes: int,
    widths: tuple[int, ...],
    blocks: int,
    attention: bool,
    dropout: float,
) -> keras.Model:
    """Noisy images, their time and class to their velocity.

    Args:
        image_shape: (height, width, channels); the sides can be halved once
            less than there are widths.
        num_classes: classes of the images. Number `num_classes` is no class:
            of images that have none, and to sample any.
        widths: channels of each level, the finest first; multiples of 8.
        blocks: residual blocks on each level, going down and going up.
        attention: whether the pixels of the coarsest level see each other.
        dropout: share of features that each block drops.

    Returns:
        A model of {"noisy": [B, H, W, C], "time": [B], "label": int32 [B]} to
        [B, H, W, C].
    """
    noisy = keras.Input(image_shape, name="noisy")
    time = keras.Input([], name="time")
    label = keras.Input([], dtype="int32", name="label")
    condition = _condition(time, label, num_classes, 4 * widths[0])

    def residual(x, width):
        return _residual(x, condition, width, dropout)

    x = layers.Conv2D(widths[0], 3, padding="same")(noisy)
    skips = []
    for level, width in enumerate(widths):
        if level:
            x = layers.Conv2D(width, 3, strides=2, padding="same")(x)
        for _ in range(blocks):
            x = residual(x, width)
        skips.append(x)
    x = residual(x, widths[-1])
    if attention:
        x = _attention(x)
    for level, width in reversed(list(enumerate(widths))):
        x = layers.Concatenate()([x, skips.pop()])
        for _ in range(blocks):
            x = residual(x, width)
        if level:
            x = layers.UpSampling2D(2)(x)
            x = layers.Conv2D(width, 3, padding="same")(x)
    x = layers.Activation("silu")(_normalization()(x))
    velocity = layers.Conv2D(
        image_shape[-1],
        3,
        padding="same",
        kernel_initializer="zeros",
        name="velocity",
    )(x)
    return keras.Model({"noisy": noisy, "time": time, "label": label}, velocity)


def _condition(time, label, num_classes, width):
    """What every block is told: [B, width]."""
    x = TimeEmbedding(width, name="time_embedding")(time)
    x = layers.Dense(width, activation="silu")(x)
    x = layers.Dense(width)(x)
    of_class = layers.Embedding(num_classes + 1, width)(label)
    return layers.Activation("silu")(layers.Add()([x, of_class]))


def _residual(x, condition, width, dropout):
    """Adaptive group normalization between two convolutions.

    As of Dhariwal and Nichol, 2021, "Diffusion Models Beat GANs on Image
    Synthesis". The second convolution starts at 0: a block begins as the
    identity.
    """
    y = layers.Activation("silu")(_normalization()(x))
    y = layers.Conv2D(width, 3, padding="same", use_bias=False)(y)
    y = layers.GroupNormalization(GROUPS, center=False, scale=False)(y)
    z = layers.Dense(2 * width, kernel_initializer="zeros")(condition)
    scale, shift = ops.split(layers.Reshape([1, 1, 2 * width])(z), 2, axis=-1)
    y = layers.Activation("silu")(y * (1 + scale) + shift)
    y = layers.Dropout(dropout)(y)
    y = layers.Conv2D(width, 3, padding="same", kernel_initializer="zeros")(y)
    if x.shape[-1] != width:
        x = layers.Conv2D(width, 1)(x)
    return layers.Add()([x, y])


def _attention(x):
    """Each pixel sees all: [B, H, W, C] to the same."""
    *sides, width = x.shape[1:]
    y = layers.Reshape([math.prod(sides), width])(_normalization()(x))
    heads = max(width // _HEAD_WIDTH, 1)
    y = layers.MultiHeadAttention(heads, width // heads)(y, y)
    return layers.Add()([x, layers.Reshape([*sides, width])(y)])


def _normalization():
    return layers.GroupNormalization(GROUPS)
