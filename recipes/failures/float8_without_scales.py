"""8-bit gradients without scales: a part of the network stops learning.

The mistake: a layer casts the gradient that comes back to E5M2, "since it has
the range of float16". It has its exponents, and 8 fewer bits below them: what
is under 8e-6 becomes 0. Loss scaling is no help where the layers compute in
bfloat16, which does without.

The gradients of the second head are less than 5e-9. The loss shows nothing,
since that head counts 3e-5 in it; the image is never learned.

The fix: `tfamp.float8(model)`, which gives each tensor a scale of its own.

Both are trained in bfloat16, on which tfamp puts 8 bits, whatever --precision
says, but for float32, where the layer casts nothing.

Measured: the last training loss of the image, of 10 epochs. On a CPU with
AVX512-BF16, TensorFlow 2.21.0, Keras 3.15.1:

    seed   mistake   mended   float32, with the mistake
    0      0.919     0.063    0.062
"""

import functools

import keras
import tensorflow as tf

import tfamp
from recipes.failures import task
from recipes.failures.two_heads import (
    compile_two_heads,
    two_heads,
    two_targets,
)


@keras.saving.register_keras_serializable(package="recipes")
class UnscaledDense(keras.layers.Dense):
    """A layer whose gradients are cast to 8 bits as they are."""

    def call(self, inputs, training=None):
        outputs = super().call(inputs, training=training)
        if self.compute_dtype == "float32":
            return outputs
        return _with_8_bit_gradient(outputs)


def build_model(healed: bool) -> keras.Model:
    """The two heads; only the mended ones scale what has 8 bits."""
    is_float32 = keras.config.dtype_policy().compute_dtype == "float32"
    dtype = "float32" if is_float32 else "mixed_bfloat16"
    dense = keras.layers.Dense if healed else UnscaledDense
    model = two_heads(dense=functools.partial(dense, dtype=dtype))
    optimizer = keras.optimizers.Adam(3e-3)
    if healed:
        tfamp.keep_float32(model)
        tfamp.float8(model, skip="none")
        optimizer = tfamp.wrap_optimizer(optimizer, dtype)
    compile_two_heads(model, optimizer)
    return model


@tf.custom_gradient
def _with_8_bit_gradient(x):
    def gradient(upstream):
        in_8_bits = tf.cast(tf.cast(upstream, tf.float32), "float8_e5m2")
        return tf.cast(in_8_bits, upstream.dtype)

    return tf.identity(x), gradient


FAILURE = task.Failure(
    "8-bit gradients without scales", build_model, two_targets, "image_loss"
)
