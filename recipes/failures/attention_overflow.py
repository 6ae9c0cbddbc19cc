"""Attention logits beyond 65504: NaN from the first step on.

The mistake: gray levels of 0 to 255 go into attention as they are, under
mixed_float16, and the logits are not divided by the root of the key size. Each
row of the image is a token. The products of queries and keys are in the
hundred thousands, inf in float16, and the softmax of two infs is NaN. No loss
scale helps: the forward pass overflows. A trained model can come here too, by
logits that grow as it learns.

The fix: `tfamp.keep_float32(model, ["query", "key", "logits", "weights"])`, as
`tfamp.probe` advises: the softmax too, for what it is given in float32 it would
take as float16. A softmax that is float32 inside, as
of `tfamp.keep_float32(model)`, comes too late: the inf is there before.
bfloat16 holds the logits without any fix.

`keras.layers.MultiHeadAttention` in this place fails alike, for it divides
after the product. In float32 as a whole it trains, and so does attention with
normalized queries and keys (Henry et al. 2020, "Query-Key Normalization for
Transformers").

Measured: the last training loss of 10 epochs, and the test accuracy. On a CPU
with AVX512-BF16, TensorFlow 2.21.0, Keras 3.15.1:

    seed   mistake         mended          float32         bfloat16, mistake
    0      NaN    0.053    0.022  0.975    0.024  0.964    0.023  0.978
    1      NaN    0.100    0.013  0.978    0.021  0.986    0.018  0.989
    2      NaN    0.261    0.029  0.992    0.057  0.953    0.024  0.981
"""

import keras
import tensorflow as tf
from keras import layers

import tfamp
from recipes.failures import task

ATTENTION = ("query", "key", "logits", "weights")


def build_model(healed: bool) -> keras.Model:
    """A classifier of 8 tokens; the mended one attends in float32."""
    rows = keras.Input([8, 8])
    x = layers.Dense(32, name="embedding")(rows)
    query = layers.Dense(32, name="query")(x)
    key = layers.Dense(32, name="key")(x)
    value = layers.Dense(32, name="value")(x)
    logits = layers.Dot(axes=2, name="logits")([query, key])
    weights = layers.Softmax(name="weights")(logits)
    attended = layers.Dot(axes=(2, 1), name="attended")([weights, value])
    x = layers.LayerNormalization(name="norm")(layers.Add()([x, attended]))
    x = layers.Dense(64, "relu", name="hidden")(layers.Flatten()(x))
    model = keras.Model(rows, layers.Dense(task.NUM_CLASSES, name="digit")(x))
    optimizer = keras.optimizers.Adam(3e-3)
    if healed:
        tfamp.keep_float32(model, ATTENTION)
        optimizer = tfamp.wrap_optimizer(optimizer)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # Stock Keras scales the loss of the one with the mistake.
        auto_scale_loss=not healed,
        jit_compile=False,
    )
    return model


def rows_of_gray_levels(pixels: tf.Tensor, label: tf.Tensor):
    """The pixels as they are stored, a token in each row."""
    return pixels, label


FAILURE = task.Failure(
    "attention logits beyond 65504", build_model, rows_of_gray_levels
)
