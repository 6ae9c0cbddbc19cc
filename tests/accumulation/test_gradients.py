"""Gradients of real networks in 16 bits, against those in float32."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import mostly_long
from tfamp.accumulation.trace import summing_in_float32

# Bias gradients are sums over all of them: bfloat16 stalls at 256.
TOKENS = (16, 256)
PIXELS = (4, 64, 64)


def language_model():
    tokens = keras.Input(TOKENS[1:], dtype="int32")
    x = layers.Embedding(64, 32)(tokens)
    y = layers.LayerNormalization()(x)
    y = layers.MultiHeadAttention(2, 16)(y, y, use_causal_mask=True)
    x = layers.Add()([x, y])
    y = layers.LayerNormalization()(x)
    y = layers.Dense(64, activation="gelu")(y)
    x = layers.Add()([x, layers.Dense(32)(y)])
    random = np.random.default_rng(0)
    data = random.integers(0, 64, TOKENS), random.integers(0, 8, TOKENS)
    return keras.Model(tokens, layers.Dense(64)(x)), data


def convolutions(activation):
    images = keras.Input((*PIXELS[1:], 3))
    x = layers.Conv2D(8, 3, padding="same", activation=activation)(images)
    x = layers.Conv2D(8, 3, padding="same")(x)
    x = layers.BatchNormalization()(x)
    x = layers.Activation(activation)(x)
    random = np.random.default_rng(0)
    pixels = random.normal(size=(*PIXELS, 3)).astype("float32")
    model = keras.Model(images, layers.Conv2D(4, 1)(x))
    return model, (pixels, random.integers(0, 4, PIXELS))


def gradients(model, data, scale=1.0):
    def compute():
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(
                data[1], model(data[0], training=True), from_logits=True
            )
            loss = tf.reduce_mean(tf.cast(loss, "float32")) * scale
        return [
            tf.cast(tf.convert_to_tensor(g), "float32") / scale
            for g in tape.gradient(
                loss, [v.value for v in model.trainable_variables]
            )
        ]

    function = tf.function(summing_in_float32(compute), autograph=False)
    return [np.asarray(value, "float64") for value in function()]


def errors(build, precision):
    """By weight: its gradient's relative error."""
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    model, data = build()
    weights = model.get_weights()
    right = gradients(model, data)
    names = [v.path for v in model.trainable_variables]
    if precision == "rounded kernels":
        narrow = [
            w.astype(tf.bfloat16.as_numpy_dtype) if w.ndim > 1 else w
            for w in weights
        ]
        model.set_weights(narrow)
        made = gradients(model, data)
    else:
        keras.config.set_dtype_policy(precision)
        model, _ = build()
        model.set_weights(weights)
        tfamp.keep_float32(model)
        scale = 1024.0 if precision == "mixed_float16" else 1.0
        made = gradients(model, data, scale)
    sizes = [np.linalg.norm(each) for each in right]
    return {
        name: np.linalg.norm(a - b) / size
        for name, size, a, b in zip(names, sizes, right, made, strict=True)
        # Biases before a normalization have none.
        if size > 1e-6
    }


BUILDS = {
    "language model": language_model,
    "convolutions": lambda: convolutions("gelu"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    mostly_long(
        [
            (name, precision)
            for name in BUILDS
            for precision in ("mixed_bfloat16", "mixed_float16")
        ],
        always=[("language model", "mixed_bfloat16")],
    ),
)
def test_gradients_of_every_layer_are_those_of_float32(name, precision):
    found = errors(BUILDS[name], precision)
    assert len(found) >= 7
    assert {name: e for name, e in found.items() if e > 0.015} == {}


@pytest.mark.long
def test_where_relu_is_on_changes_with_the_rounding_of_kernels_alone():
    def build():
        return convolutions("relu")

    rounded = max(errors(build, "rounded kernels").values())
    # No sum in 16 bits: all of it was computed in float32.
    assert rounded > 0.015
    assert max(errors(build, "mixed_bfloat16").values()) < 2 * rounded
