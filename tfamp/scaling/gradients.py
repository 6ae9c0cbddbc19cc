"""Gradients across replicas: sum them, judge them, rescale them.

Everything here runs in the replica context of a `tf.distribute` strategy, or
with no strategy at all. A gradient is a `tf.Tensor`, a `tf.IndexedSlices`
(which stays one) or None, in the order of the variables it belongs to.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from tfamp.distribute import reduction

Present: TypeAlias = tf.Tensor | tf.IndexedSlices
Gradient: TypeAlias = Present | None


def to_tensors(gradients: Sequence[Any]) -> list[Gradient]:
    """As Keras's optimizers: arrays and numbers are gradients too."""
    return [
        each
        if each is None or isinstance(each, (tf.Tensor, tf.IndexedSlices))
        else tf.convert_to_tensor(each)
        for each in gradients
    ]


def all_reduce(
    gradients: Sequence[Gradient],
    overwrites: Sequence[bool],
    dtype: str | None = None,
) -> list[Gradient]:
    """Sums gradients over all replicas, once, in as few calls as possible.

    Args:
        gradients: one per variable, of any shape, or None.
        overwrites: one per variable: whether its "gradient" is its next value
            (float8 scales and histories). Those are not sums of anything;
            their replicas agree by maximum.
        dtype: the dtype that crosses the wire, or None for the gradients' own,
            and float32 instead of 16 bits. The sums come back in the
            gradients' own dtype.

    Returns:
        The gradients, equal on every replica. Rows of an `IndexedSlices` that
        name the same index are summed, so that squares and norms computed
        from its values are those of the true gradient.
    """
    reduced = list(gradients)
    summed = [
        i
        for i, (gradient, overwrite) in enumerate(
            zip(gradients, overwrites, strict=True)
        )
        if gradient is not None and not overwrite
    ]
    agreed = [
        i
        for i, (gradient, overwrite) in enumerate(
            zip(gradients, overwrites, strict=True)
        )
        if gradient is not None and overwrite
    ]
    sums = reduction.sum_over_replicas([gradients[i] for i in summed], dtype)
    for i, gradient in zip(summed, sums, strict=True):
        reduced[i] = gradient
    maxima = reduction.maximum([gradients[i] for i in agreed])
    for i, gradient in zip(agreed, maxima, strict=True):
        reduced[i] = gradient
    return [
        _sum_duplicate_rows(gradient)
        if isinstance(gradient, tf.IndexedSlices)
        else gradient
        for gradient in reduced
    ]


def unscale(
    gradients: Sequence[Gradient],
    overwrites: Sequence[bool],
    scale: tf.Tensor | None = None,
    clip_norm: float | None = None,
    take: Callable[[Sequence[Gradient]], list[Gradient]] | None = None,
) -> tuple[tf.Tensor, list[Gradient]]:
    """Judges gradients, divides them by their scale, and clips them.

    One pass tells both whether they are finite and their global norm; one
    multiplication both unscales and clips them.

    Args:
        gradients: reduced, one per variable, of any shape, or None.
        overwrites: one per variable: whether its "gradient" is its next value.
        scale: a power of two; None for 1.
        clip_norm: what the norm of all true gradients together is clipped to;
            None for no limit.
        take: what of the gradients to go on with, where that is not all of
            them: they are judged whole.

    Returns:
        Whether the step can be applied: a boolean scalar. It needs the sum of
        the squares of all values to be finite in float32, which optimizers and
        clipping compute: a gradient of 1.8e19 and more is skipped as inf is.
        And the true gradients, float32 where anything was multiplied.
    """
    scaled = [
        None if overwrite else gradient
        for gradient, overwrite in zip(gradients, overwrites, strict=True)
    ]
    next_values = [
        gradient if overwrite else None
        for gradient, overwrite in zip(gradients, overwrites, strict=True)
    ]
    # The reciprocal of a power of two is exact.
    factor = None if scale is None else 1.0 / scale
    squares = _sum_of_squares(scaled)
    norm = tf.sqrt(squares) if scale is None else tf.sqrt(squares) * factor
    # Optimizers square the true gradient: a scale below 1 makes it larger.
    finite = tf.math.is_finite(squares if scale is None else squares + norm**2)
    if clip_norm is not None:
        clip = clip_norm / tf.maximum(norm, clip_norm)
        factor = clip if factor is None else factor * clip
    if any(overwrites):
        finite = tf.logical_and(finite, _each_is_finite(next_values))
    gradients = gradients if take is None else take(gradients)
    if factor is None:
        return finite, list(gradients)
    return finite, [
        gradient if overwrite else multiply(gradient, factor)
        for gradient, overwrite in zip(gradients, overwrites, strict=True)
    ]


def multiply(gradient: Gradient, factor: tf.Tensor) -> Gradient:
    """`gradient * factor`, computed in float32 or better.

    A 16-bit gradient (of a 16-bit variable) becomes float32: divided by its
    scale it may be too small for the dtype it came in.
    """

    def scaled(values: tf.Tensor) -> tf.Tensor:
        values = _at_least_float32(values)
        return values * tf.cast(factor, values.dtype)

    return map_values(scaled, gradient)


def map_values(
    function: Callable[[tf.Tensor], tf.Tensor], gradient: Gradient
) -> Gradient:
    """Applies a function to a gradient's values; None stays None."""
    if gradient is None:
        return None
    return reduction.map_values(function, gradient)


def _values(gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    is_sparse = isinstance(gradient, tf.IndexedSlices)
    return gradient.values if is_sparse else gradient


def _sum_of_squares(gradients: Sequence[Gradient]) -> tf.Tensor:
    """Of all values of all gradients: a float32 scalar, from one pass."""
    halves = [
        tf.cast(tf.nn.l2_loss(_at_least_float32(_values(each))), tf.float32)
        for each in gradients
        if each is not None
    ]
    return 2.0 * tf.add_n(halves) if halves else tf.constant(0.0)


def _each_is_finite(gradients: Sequence[Gradient]) -> tf.Tensor:
    flags = [
        tf.reduce_all(tf.math.is_finite(_values(each)))
        for each in gradients
        if each is not None
    ]
    return tf.reduce_all(tf.stack(flags)) if flags else tf.constant(True)


def _at_least_float32(values: tf.Tensor) -> tf.Tensor:
    is_narrow = values.dtype.size < tf.float32.size
    return tf.cast(values, tf.float32) if is_narrow else values


def _sum_duplicate_rows(slices: tf.IndexedSlices) -> tf.IndexedSlices:
    """Adds rows of one index together; shapes stay static, as XLA wants.

    As many rows come out as went in: those left over hold zeros at an index
    that is already there, and change nothing. All of it runs where the rows
    are: GPUs have no segment maximum of int64, for one.
    """
    order = tf.argsort(slices.indices)
    indices = tf.gather(slices.indices, order)
    # Where the rows of each index begin.
    begins = tf.searchsorted(indices, indices)
    # 16 bits would lose what is small beside the sum so far.
    values = tf.math.unsorted_segment_sum(
        _at_least_float32(tf.gather(slices.values, order)),
        begins,
        tf.size(indices),
    )
    return tf.IndexedSlices(
        tf.cast(values, slices.values.dtype), indices, slices.dense_shape
    )
