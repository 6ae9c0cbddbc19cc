"""Attention that keeps one 16-bit number of each pair of positions.

A score is 16-bit as it leaves the product of query and key; its softmax is
float32. Keras keeps for the backward pass that softmax and a 16-bit copy of
it. Here the backward pass makes both again from the scores; with n positions
the memory that grows with n**2 is a third.
"""

import keras
import tensorflow as tf

_DTYPES = ("bfloat16", "float16", "float32")


def dot_product_attention(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    *,
    mask: tf.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> tf.Tensor:
    """`keras.ops.dot_product_attention` with its results, and a lean gradient.

    Results agree to rounding, mostly to the bit. Grouped heads and float64
    are left to Keras.

    Args:
        query: [B, T, N, H], of N heads with H features each.
        key: [B, S, N, H].
        value: [B, S, N, H].
        mask: bool, to be broadcast to [B, N, T, S]: True where a query sees a
            key.
        scale: what the products are multiplied with; 1 / sqrt(H) by default.
        is_causal: whether a query sees the keys up to its own position only.

    Returns:
        [B, T, N, H] in the dtype of the arguments.
    """
    heads = {each.shape[2] for each in (query, key, value)}
    dtypes = {each.dtype for each in (query, key, value)}
    is_plain = (
        len(heads) == len(dtypes) == 1
        and keras.backend.standardize_dtype(query.dtype) in _DTYPES
        and not any(
            keras.backend.is_keras_tensor(each) for each in (query, key, value)
        )
    )
    if not is_plain:
        return keras.ops.dot_product_attention(
            query, key, value, mask=mask, scale=scale, is_causal=is_causal
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5

    def visible(scores):
        """What may be seen, to be broadcast to the scores; None for all."""
        if not is_causal:
            return mask
        sizes = tf.shape(scores)[-2:]
        earlier = tf.linalg.band_part(tf.ones(sizes, tf.bool), -1, 0)
        return earlier if mask is None else tf.logical_and(earlier, mask)

    def softmax(scores):
        """Float32 probabilities of the scores."""
        logits = tf.cast(scores, tf.float32) * scale
        seen = visible(scores)
        if seen is not None:
            logits = tf.where(seen, logits, _HIDDEN)
        return tf.nn.softmax(logits)

    @tf.custom_gradient
    def attend(query, key, value):
        query, key, value = (_by_head(each) for each in (query, key, value))
        scores = tf.matmul(query, key, transpose_b=True)
        probabilities = tf.cast(softmax(scores), value.dtype)

        def gradient(upstream):
            # After upstream: else TensorFlow finds that the forward pass has
            # made the same softmax, and keeps that one.
            with tf.control_dependencies([upstream]):
                again = tf.identity(scores)
            probabilities = softmax(again)
            upstream = _by_head(upstream)
            value_gradient = tf.matmul(
                tf.cast(probabilities, value.dtype), upstream, transpose_a=True
            )
            slope = tf.cast(
                tf.matmul(upstream, value, transpose_b=True), tf.float32
            )
            mean = tf.reduce_sum(slope * probabilities, -1, keepdims=True)
            logits_gradient = (slope - mean) * probabilities
            if mask is not None:
                # Only where nothing is seen are hidden ones probable.
                logits_gradient = tf.where(visible(again), logits_gradient, 0.0)
            scores_gradient = tf.cast(logits_gradient * scale, scores.dtype)
            return (
                _by_head(tf.matmul(scores_gradient, key)),
                _by_head(tf.matmul(scores_gradient, query, transpose_a=True)),
                _by_head(value_gradient),
            )

        return _by_head(tf.matmul(probabilities, value)), gradient

    return attend(query, key, value)


# As Keras has it: far below any logit, and far from overflow.
_HIDDEN = -0.7 * tf.float32.max


def _by_head(x: tf.Tensor) -> tf.Tensor:
    """[B, T, N, H] to [B, N, T, H], and back."""
    return tf.transpose(x, (0, 2, 1, 3))
