"""A float16 softmax head under a loss of one's own: training freezes.

The mistake: `Dense(10, activation="softmax")` under mixed_float16, and a
cross-entropy written by hand. (The losses in `compile` cast to float32 first;
code of one's own gets float16.) The derivative of log(p) is 1 / p, which
exceeds 65504 as soon as a class has a probability below 1.5e-5, and the zeros
of a one-hot label times inf are NaN. The 1e-8 that was to prevent this is zero
in float16. So the more certain the network is, the more steps are skipped; the
scale, which is not at fault, is halved each time, and stock Keras halves it to
0. The loss stays finite: it just moves no more.

The fix: `tfamp.keep_float32(model)`, which computes this softmax in float32.

Measured: the last training loss of 10 epochs, and the test accuracy. On a CPU
with AVX512-BF16, TensorFlow 2.21.0, Keras 3.15.1:

    seed   mistake         mended          float32         bfloat16, mistake
    0      0.527  0.872    0.030  0.969    0.020  0.972    0.023  0.969
    1      0.561  0.872    0.022  0.981    0.021  0.975    0.027  0.975
    2      0.461  0.897    0.035  0.978    0.049  0.978    0.049  0.972
"""

import keras
import tensorflow as tf
from keras import layers

import tfamp
from recipes.failures import task


class OwnCrossEntropy(keras.Model):
    """Takes the logarithm of the probabilities in the dtype they come in."""

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        one_hot = tf.one_hot(y, task.NUM_CLASSES, dtype=y_pred.dtype)
        log_likelihoods = one_hot * tf.math.log(y_pred + 1e-8)
        return -tf.reduce_mean(tf.reduce_sum(log_likelihoods, axis=-1))


def build_model(healed: bool) -> keras.Model:
    """A classifier; the mended one has its softmax in float32."""
    pixels = keras.Input([64])
    x = layers.Dense(64, "relu", name="first")(pixels)
    x = layers.Dense(64, "relu", name="second")(x)
    x = layers.Dense(task.NUM_CLASSES, "softmax", name="probabilities")(x)
    model = OwnCrossEntropy(pixels, x)
    optimizer = keras.optimizers.Adam(1e-2)
    if healed:
        tfamp.keep_float32(model)
        optimizer = tfamp.wrap_optimizer(optimizer)
    model.compile(
        optimizer=optimizer,
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        # Stock Keras scales the loss of the one with the mistake.
        auto_scale_loss=not healed,
        jit_compile=False,
    )
    return model


FAILURE = task.Failure("a float16 softmax head", build_model, task.flat_pixels)
