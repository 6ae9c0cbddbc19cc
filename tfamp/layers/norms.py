"""Norms over the last axis whose gradients keep little and read little.

Keras computes them in float32, and for the backward pass keeps a float32 copy
of the input, the normalized values in float32, and more. Here the backward
pass makes these again from the input, which has 16 bits, and from one or two
float32 numbers of each row.
"""

import keras
import tensorflow as tf

from tfamp.files.saved_models import registered
from tfamp.layers import row_products

_DTYPES = ("bfloat16", "float16", "float32")


@registered
class RMSNormalization(keras.layers.RMSNormalization):
    """Keras's layer with the same weights and results, and a lean gradient."""

    def call(self, inputs):
        if not _is_supported(self, inputs):
            return super().call(inputs)
        scale = tf.convert_to_tensor(self.scale)
        return _rms_normalize(inputs, scale, self.epsilon)


@registered
class LayerNormalization(keras.layers.LayerNormalization):
    """Keras's layer with the same weights and results, and a lean gradient."""

    def call(self, inputs):
        if not _is_supported(self, inputs):
            return super().call(inputs)
        size = inputs.shape[-1]
        gamma = self.gamma if self.scale else tf.ones([size])
        beta = self.beta if self.center else tf.zeros([size])
        outputs = _layer_normalize(
            inputs,
            tf.convert_to_tensor(gamma),
            tf.convert_to_tensor(beta),
            self.epsilon,
        )
        return tf.cast(outputs, self.compute_dtype)


def has_last_axis(
    layer: keras.layers.RMSNormalization | keras.layers.LayerNormalization,
) -> bool:
    """Whether a built layer normalizes over the last axis, as by default."""
    # Once an option of LayerNormalization, of which Keras warns.
    by_variance = getattr(layer, "rms_scaling", False)
    return list(layer.axis) == [-1] and not by_variance


def _is_supported(layer, inputs) -> bool:
    dtype = keras.backend.standardize_dtype(inputs.dtype)
    return has_last_axis(layer) and dtype in _DTYPES and len(inputs.shape) > 1


def _rms_normalize(inputs, scale, epsilon):
    """[..., D] over its root mean square, times [D]; in the inputs' dtype."""

    @tf.custom_gradient
    def normalize(x, scale):
        x32 = tf.cast(x, tf.float32)
        inverse = tf.math.rsqrt(
            tf.reduce_mean(tf.square(x32), -1, keepdims=True) + epsilon
        )
        scale32 = tf.cast(scale, tf.float32)

        def gradient(upstream):
            x32, upstream32 = _in_float32(x, upstream)
            product = x32 * upstream32
            mean = row_products.dot(product, scale32) / x.shape[-1]
            x_gradient = upstream32 * (scale32 * inverse) - x32 * (
                mean * inverse**3
            )
            scale_gradient = row_products.sum_rows(product, inverse)
            return (
                tf.cast(x_gradient, x.dtype),
                tf.cast(scale_gradient, scale.dtype),
            )

        return tf.cast(x32 * inverse * scale32, x.dtype), gradient

    return normalize(inputs, scale)


def _layer_normalize(inputs, gamma, beta, epsilon):
    """[..., D] of mean 0 and variance 1, times and plus [D]."""

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        x32 = tf.cast(x, tf.float32)
        mean, variance = tf.nn.moments(x32, -1, keepdims=True)
        inverse = tf.math.rsqrt(variance + epsilon)
        gamma32 = tf.cast(gamma, tf.float32)

        def gradient(upstream):
            x32, upstream32 = _in_float32(x, upstream)
            normalized = (x32 - mean) * inverse
            product = normalized * upstream32
            size = x.shape[-1]
            x_gradient = inverse * (
                upstream32 * gamma32
                - row_products.dot(upstream32, gamma32) / size
                - normalized * (row_products.dot(product, gamma32) / size)
            )
            return (
                tf.cast(x_gradient, x.dtype),
                tf.cast(row_products.sum_rows(product), gamma.dtype),
                tf.cast(row_products.sum_rows(upstream32), beta.dtype),
            )

        normalized = (x32 - mean) * inverse
        outputs = normalized * gamma32 + tf.cast(beta, tf.float32)
        return tf.cast(outputs, x.dtype), gradient

    return normalize(inputs, gamma, beta)


def _in_float32(x, upstream):
    """Casts both in the backward pass.

    Unless x waits for upstream, TensorFlow finds that the forward pass has
    made the same cast, and keeps that one for the backward pass.
    """
    with tf.control_dependencies([upstream]):
        return tf.cast(x, tf.float32), tf.cast(upstream, tf.float32)
