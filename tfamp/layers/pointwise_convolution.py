"""1x1 convolutions as products of matrices, which CPUs do faster.

Each pixel is a row: [B, H, W, C] x [1, 1, C, K] is [B * H * W, C] x [C, K].
"""

import keras
import tensorflow as tf

from tfamp.files.saved_models import registered
from tfamp.layers import row_products


@registered
class Conv2D(keras.layers.Conv2D):
    """Keras's 1x1 `Conv2D` with the same weights and results.

    On a GPU or a TPU it computes as Keras's does, and so it does once it has
    low-rank weights.
    """

    def call(self, inputs):
        if not is_pointwise(self) or not row_products.is_faster():
            return super().call(inputs)
        if self.strides != (1, 1):
            # The mean of one pixel: a copy of each that a stride leaves, and
            # several times faster than a slice with a step.
            inputs = tf.nn.avg_pool2d(inputs, 1, self.strides, "VALID")
        kernel = tf.convert_to_tensor(self.kernel)
        rows = tf.matmul(
            row_products.to_rows(inputs),
            tf.reshape(kernel, kernel.shape[2:]),
        )
        if self.use_bias:
            rows = _add_bias(rows, tf.convert_to_tensor(self.bias))
        outputs = row_products.from_rows(rows, inputs)
        return outputs if self.activation is None else self.activation(outputs)


def is_pointwise(layer: keras.layers.Conv2D) -> bool:
    """Whether the settings of a layer make it a product of matrices."""
    return (
        layer.kernel_size == (1, 1)
        and layer.groups == 1
        and layer.data_format == "channels_last"
        and not layer.lora_enabled
    )


@tf.custom_gradient
def _add_bias(rows, bias):
    """[N, K] + [K]. The sum that is the bias's gradient is one of products."""

    def gradient(upstream):
        return upstream, row_products.sum_rows(upstream)

    return tf.nn.bias_add(rows, bias), gradient
