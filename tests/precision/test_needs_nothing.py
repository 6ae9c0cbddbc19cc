"""Models that need nothing of `keep_float32` are what they were, bit by bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import first_always
from tfamp.precision.keep_float32 import keep_float32

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
TARGETS = np.random.default_rng(1).normal(size=(4, 5)).astype("float32")
ACTIVATIONS = ("relu", "leaky_relu", "relu6", "tanh", "sigmoid")


def convolution(x, rng):
    x = layers.Conv2D(6, 3, padding="same")(x)
    x = layers.BatchNormalization()(x)
    return layers.Activation(rng.choice(ACTIVATIONS))(x)


def depthwise(x, rng):
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    return layers.Conv2D(6, 1, activation=rng.choice(ACTIVATIONS))(x)


def residual(x, rng):
    width = x.shape[-1]
    inner = layers.LayerNormalization()(x)
    inner = layers.Dense(8, activation=rng.choice(ACTIVATIONS))(inner)
    return x + layers.Dense(width)(inner)


def two_ways(x, rng):
    left = layers.Dense(4, activation=rng.choice(ACTIVATIONS))(x)
    right = layers.Dropout(0.2, seed=3)(layers.Dense(3)(x))
    return layers.Concatenate()([left, right])


def pooled(x, rng):
    return layers.MaxPooling2D()(x) if x.shape[1] > 2 else x


BLOCKS = (convolution, depthwise, residual, two_ways, pooled)


def mlp(rng):
    inputs = keras.Input(IMAGES.shape[1:])
    # A normalization of the data would need them unrounded.
    x = layers.Dense(6)(layers.Flatten()(inputs))
    for _ in range(3):
        x = residual(x, rng) if rng.random() < 0.5 else two_ways(x, rng)
    return inputs, x


def convolutional(rng):
    inputs = keras.Input(IMAGES.shape[1:])
    x = layers.Conv2D(4, 3, padding="same")(inputs)
    for block in rng.choice(BLOCKS, size=rng.integers(2, 6)):
        x = block(x, rng)
    return inputs, layers.GlobalAveragePooling2D()(x)


class Own(layers.Layer):
    """Somebody's code of sums and products alone."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(4, activation="relu")

    def call(self, x):
        scale = keras.ops.cast(keras.ops.shape(x)[-1], x.dtype)
        return keras.ops.concatenate([self.inner(x) * scale, x - 1], -1)


def own(rng):
    inputs, x = mlp(rng)
    return inputs, Own()(x)


def generated(kind, seed, dtype_of_head=None):
    keras.utils.set_random_seed(seed)
    inputs, x = kind(np.random.default_rng(seed))
    return keras.Model(inputs, layers.Dense(5, dtype=dtype_of_head)(x))


def step_of(model):
    """Outputs, loss and gradients of a training step, and its statistics."""
    with tf.GradientTape() as tape:
        outputs = model(IMAGES, training=True)
        errors = tf.cast(outputs, "float32") - TARGETS
        loss = tf.reduce_mean(errors * errors)
    weights = [weight.value for weight in model.trainable_variables]
    gradients = tape.gradient(loss, weights)
    moved = [weight.value for weight in model.non_trainable_variables]
    return [outputs, loss, *gradients, *moved, model(IMAGES, training=False)]


def assert_same_bits(results, expected):
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture(params=["mixed_bfloat16", "mixed_float16"])
def precision(request):
    keras.config.set_dtype_policy(request.param)
    return request.param


@pytest.mark.parametrize("seed", first_always(range(12), 1))
@pytest.mark.parametrize("kind", [mlp, convolutional, own])
def test_a_step_has_the_same_bits_before_and_after(precision, kind, seed):
    model, kept = generated(kind, seed), generated(kind, seed)
    classes = [type(layer) for layer in kept.layers]
    policies = [layer.dtype_policy for layer in kept.layers]
    assert not [k for k in keep_float32(kept, outputs=False) if k.changed]
    assert classes == [type(layer) for layer in kept.layers]
    assert policies == [layer.dtype_policy for layer in kept.layers]
    assert_same_bits(step_of(kept), step_of(model))


@pytest.mark.parametrize("kind", first_always([mlp, convolutional, own], 1))
def test_so_have_models_whose_head_is_float32_by_itself(precision, kind):
    model, kept = (generated(kind, 20, "float32") for _ in range(2))
    assert not [each for each in keep_float32(kept) if each.changed]
    assert_same_bits(step_of(kept), step_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [mlp, convolutional, own])
def test_a_training_ends_in_the_same_bits(precision, kind):
    ended = []
    for is_kept in (False, True):
        model = generated(kind, 30, "float32")
        model.compile("adam", "mse")
        tfamp.fit(
            model,
            IMAGES,
            TARGETS,
            batch_size=2,
            epochs=2,
            shuffle=False,
            verbose=0,
            keep_float32=is_kept,
        )
        ended.append(model.weights)
    assert_same_bits(*([w.value for w in weights] for weights in ended))
