"""A network of two heads whose second loss has a small weight.

The first head reads the digit. The second draws the image again, and its loss,
the mean squared error, has the weight 1e-5. The derivative by one of its
outputs is then about 2e-5 * error / (64 examples * 64 pixels), less than 5e-9.
float16 rounds to zero what is below 3e-8.
"""

from collections.abc import Callable

import keras
import tensorflow as tf
from keras import layers

from recipes.failures.task import NUM_CLASSES

IMAGE_LOSS_WEIGHT = 1e-5


def two_heads(
    model_class: type[keras.Model] = keras.Model,
    dense: Callable[..., keras.layers.Layer] = layers.Dense,
) -> keras.Model:
    """The network, not compiled: [B, 64] to logits and to pixels.

    Args:
        model_class: called with the input and the outputs.
        dense: called as `keras.layers.Dense`.
    """
    pixels = keras.Input([64])
    shared = dense(64, "relu", name="shared")(pixels)
    digit = dense(NUM_CLASSES, name="digit")(shared)
    hidden = dense(64, "relu", name="hidden")(shared)
    image = dense(64, name="image")(hidden)
    return model_class(pixels, {"digit": digit, "image": image})


def compile_two_heads(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> None:
    """Compiles it; the optimizer is taken as it is."""
    model.compile(
        optimizer=optimizer,
        loss={
            "digit": keras.losses.SparseCategoricalCrossentropy(
                from_logits=True
            ),
            "image": "mean_squared_error",
        },
        loss_weights={"digit": 1.0, "image": IMAGE_LOSS_WEIGHT},
        metrics={"digit": "accuracy"},
        auto_scale_loss=False,
        jit_compile=False,
    )


def two_targets(pixels: tf.Tensor, label: tf.Tensor):
    """Pixels, and what each head is to make of them."""
    pixels = tf.reshape(pixels, [64]) / 255.0
    return pixels, {"digit": label, "image": pixels}
