"""Sums and products over the last axis, as products of matrices.

A CPU multiplies matrices several times faster than it sums, and sums in
float32 whatever it multiplies. [..., D] is a matrix of rows [N, D] without a
copy.
"""

import tensorflow as tf


def is_faster() -> bool:
    """Whether products are faster here: on CPUs.

    GPUs and TPUs sum as fast; their libraries do convolutions better; and
    there a float32 product may round its factors (TensorFloat-32, bfloat16).
    """
    return not any(
        tf.config.list_logical_devices(kind) for kind in ("GPU", "TPU")
    )


def to_rows(x: tf.Tensor) -> tf.Tensor:
    """[..., D] to [N, D]."""
    return tf.reshape(x, (-1, x.shape[-1]))


def from_rows(rows: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """[N, K] to [..., K], where `like` is [..., D]."""
    sizes = like.shape.as_list()[:-1]
    if None in sizes:
        sizes = tf.unstack(tf.shape(like)[:-1])
    return tf.reshape(rows, (*sizes, rows.shape[-1]))


def dot(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """[..., D] times [D], summed over D: [..., 1]."""
    if not is_faster():
        return tf.reduce_sum(x * weights, -1, keepdims=True)
    return from_rows(tf.matmul(to_rows(x), weights[:, None]), x)


def sum_rows(x: tf.Tensor, weights: tf.Tensor | None = None) -> tf.Tensor:
    """[..., D] times [..., 1], or times 1, summed over all but D: [D]."""
    if weights is None:
        weights = tf.ones_like(x[..., :1])
    if not is_faster():
        return tf.reduce_sum(x * weights, range(len(x.shape) - 1))
    return tf.matmul(tf.reshape(weights, (1, -1)), to_rows(x))[0]
