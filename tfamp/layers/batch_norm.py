"""Batch normalization in one operation, its statistics in float32.

Keras casts the whole input to float32 and normalizes it with half a dozen
operations, each of which reads and writes it. TensorFlow's fused operation
(cuDNN's on GPUs, oneDNN's on CPUs) reads and writes 16 bits, computes in
float32, and keeps the 16-bit input for the backward pass.
"""

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.files.saved_models import registered

# cuDNN may refuse smaller ones: tf.compat.v1.nn.fused_batch_norm raises them
# to this, which is another result.
_MIN_EPSILON_ON_GPUS = 1.001e-5
_DTYPES = ("bfloat16", "float16", "float32")


@registered
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's layer, with the same weights and results, from the fused op.

    Where that has no such results (a mask, float64, on GPUs an epsilon below
    1.001e-5), this is Keras's own computation.
    """

    def call(self, inputs, training=None, mask=None):
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        if (
            mask is not None
            or dtype not in _DTYPES
            or not is_fusible(self)
            or not _is_allowed(self.epsilon)
        ):
            return super().call(inputs, training=training, mask=mask)
        if training and self.trainable:
            outputs, mean, variance = self._normalize(inputs)
            self._move(self.moving_mean, mean)
            self._move(self.moving_variance, variance)
        else:
            outputs, _, _ = self._normalize(
                inputs, self.moving_mean, self.moving_variance
            )
        return tf.cast(outputs, self.compute_dtype)

    def _normalize(self, inputs, mean=None, variance=None):
        """The result, and the mean and variance that it was made with.

        Args:
            inputs: [B, H, W, C].
            mean, variance: [C], or None for those of the inputs.
        """
        channels = inputs.shape[-1]
        of_batch = mean is None
        result = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=_float32(self.gamma) if self.scale else tf.ones([channels]),
            offset=_float32(self.beta) if self.center else tf.zeros([channels]),
            mean=tf.zeros([0]) if of_batch else _float32(mean),
            variance=tf.zeros([0]) if of_batch else _float32(variance),
            epsilon=self.epsilon,
            is_training=of_batch,
        )
        variance = result.batch_variance
        if of_batch:
            # The op divides by N - 1, as for an estimate; Keras by N.
            rows = tf.cast(tf.reduce_prod(tf.shape(inputs)[:-1]), tf.float32)
            # Of a single row there is none, and a device may say NaN.
            variance = tf.math.multiply_no_nan(variance, (rows - 1) / rows)
        return result.y, result.batch_mean, variance

    def _move(self, average: keras.Variable, value) -> None:
        average.assign(
            _float32(average) * self.momentum + value * (1.0 - self.momentum)
        )


def is_fusible(layer: keras.layers.BatchNormalization) -> bool:
    """Whether the fused op computes what the settings of a layer ask for."""
    rank = None if layer.input_spec is None else layer.input_spec.ndim
    return (
        layer.axis in (-1, 3)
        and rank == 4
        and not keras_internals.renormalizes(layer)
        and not layer.synchronized
    )


def _is_allowed(epsilon: float) -> bool:
    on_gpus = bool(tf.config.list_logical_devices("GPU"))
    return epsilon >= _MIN_EPSILON_ON_GPUS or not on_gpus


def _float32(variable: keras.Variable) -> tf.Tensor:
    return tf.cast(variable, tf.float32)
