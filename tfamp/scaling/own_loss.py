"""The loss of a replica's rows as a part of that of the global batch.

In a `train_step` of their own users write the loss of the rows they see, and
gradients are summed over replicas. Means are to be weighted by their rows then.
Keras divides what its own losses return by the number of replicas, and nothing
that is written by hand; it takes a mask's mean over the entries that count on
this replica. Here both are means over the global batch.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import tensorflow as tf

from tfamp import keras_internals
from tfamp.errors import InputError

Reduction: TypeAlias = Literal["mean", "sum"]

# What the losses of own steps are called in a graph, where lint finds them.
LOSS_NAMES = {
    None: "loss_of_unknown_reduction",
    "mean": "mean_loss_of_replica",
    "sum": "summed_loss_of_replica",
}


class _Rows(NamedTuple):
    """What a replica has of a batch: see `tfamp.distribute.strategy.Share`."""

    here: tf.Tensor
    of_batch: tf.Tensor


_known = threading.local()


@contextlib.contextmanager
def rows_known(here: tf.Tensor, of_batch: tf.Tensor) -> Iterator[None]:
    """Within it, losses in this thread are of so many rows of a batch."""
    before = getattr(_known, "rows", None)
    _known.rows = _Rows(here, of_batch)
    try:
        yield
    finally:
        _known.rows = before


def count_of_mean(
    values: tf.Tensor,
    weights: tf.Tensor | None,
    mask: tf.Tensor | None,
    reduction: str,
) -> tuple[tf.Tensor, bool]:
    """What Keras divides a sum of losses by, and if masks or weights decide.

    Args:
        values: the losses.
        weights: what they were multiplied by, of any shape that broadcasts.
        mask: of what counts, or None.
        reduction: a kind of mean.
    """
    size = tf.cast(tf.size(values), values.dtype)
    if reduction == "mean_with_sample_weight" and weights is not None:
        return tf.reduce_sum(weights), True
    if mask is None:
        return size, False
    mask = tf.cast(mask, values.dtype)
    # An entry of the mask may stand for several losses.
    each = size / tf.maximum(tf.cast(tf.size(mask), values.dtype), 1)
    return tf.reduce_sum(mask) * each, True


class Part:
    """The part of the global batch that this replica has.

    Args:
        reduction: how what the user reduces is reduced: "mean" or "sum".
    """

    def __init__(self, reduction: Reduction):
        self._is_mean = reduction == "mean"
        self.replicas = _replicas()
        rows = getattr(_known, "rows", None)
        if rows is None or self.replicas == 1 or not _is_here(rows.here):
            self._share: Any = 1.0 / self.replicas
            self._counts: Any = None
            return
        # A replica without rows has one that must not count.
        share = tf.cast(tf.maximum(rows.here, 1), tf.float32)
        self._share = share / tf.cast(rows.of_batch, tf.float32)
        self._counts = rows.here > 0

    def trained(self, loss: tf.Tensor) -> tf.Tensor:
        """What adds up over replicas to the loss of the global batch."""
        if self.replicas == 1:
            return loss
        loss = loss * self._share if self._is_mean else loss
        return self._counted(loss)

    def logged(self, loss: tf.Tensor) -> tf.Tensor:
        """Of which the mean over replicas is the loss of the global batch."""
        if self.replicas == 1:
            return loss
        if self._is_mean and self._counts is None:
            return loss
        return self.trained(loss) * self.replicas

    @contextlib.contextmanager
    def of_keras(self) -> Iterator[None]:
        """Within it Keras's losses are reduced as the user's own are."""
        if self.replicas == 1:
            yield
            return
        with keras_internals.losses_of_replica_replaced(
            self._of_mean, self._to_mean, self._reduced
        ):
            yield

    def _counted(self, value: tf.Tensor) -> tf.Tensor:
        if self._counts is None:
            return value
        return tf.where(self._counts, value, tf.zeros_like(value))

    def _of_mean(self, value: tf.Tensor) -> tf.Tensor:
        if self._is_mean:
            return value
        return value * tf.cast(self._share, value.dtype)

    def _to_mean(self, value: tf.Tensor) -> tf.Tensor:
        if self._is_mean:
            return value
        return value / tf.cast(self._share, value.dtype)

    def _of_sum(self, value: tf.Tensor) -> tf.Tensor:
        if self._is_mean:
            return value / tf.cast(self._share, value.dtype)
        return value

    def _reduced(
        self,
        reduce,
        values,
        sample_weight=None,
        mask=None,
        reduction="sum_over_batch_size",
        dtype=None,
    ):
        values = tf.convert_to_tensor(values)
        arguments = values, sample_weight, mask
        if reduction in (None, "none") or values.shape.rank == 0:
            return reduce(*arguments, reduction, dtype)
        if reduction == "sum":
            return self._of_sum(reduce(*arguments, reduction, dtype))
        is_weighted = reduction == "mean_with_sample_weight" and (
            sample_weight is not None
        )
        if mask is None and not is_weighted:
            return reduce(*arguments, reduction, dtype)
        values = tf.cast(values, dtype or values.dtype)
        values, weights = keras_internals.weighted_values(
            values, sample_weight, mask
        )
        count, _ = count_of_mean(values, weights, mask, reduction)
        mean = tf.math.divide_no_nan(
            tf.reduce_sum(values), _over_replicas(self._counted(count))
        )
        return self._of_sum(mean)


def _over_replicas(count: tf.Tensor) -> tf.Tensor:
    replica = tf.distribute.get_replica_context()
    try:
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, count)
    except RuntimeError as error:
        raise InputError(
            "A masked or weighted mean inside of a tf.function or tf.cond "
            "cannot be counted over replicas; compute the loss outside of it."
        ) from error


def _is_here(tensor: tf.Tensor) -> bool:
    """Whether it belongs to the graph that is being made.

    A function of the user's own, traced once, would keep what it was given by
    the first graph that called it.
    """
    if tf.executing_eagerly():
        return True
    graph = getattr(tensor, "graph", None)
    return graph is tf.compat.v1.get_default_graph()


def _replicas() -> int:
    if tf.distribute.in_cross_replica_context():
        return 1
    return tf.distribute.get_strategy().num_replicas_in_sync
