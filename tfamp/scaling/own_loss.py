"""The loss of a replica's rows as a part of that of the global batch.

In a `train_step` of their own users write the loss of the rows they see, and
gradients are summed over replicas. Means are to be weighted by their rows then.
Keras divides what its own losses return by the number of replicas, and nothing
that is written by hand; it takes a mask's mean over the entries that count on
this replica. Here both are means over the global batch.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import keras
import tensorflow as tf
from absl import logging

from tfamp import keras_internals
from tfamp.errors import InputError
from tfamp.scaling.gradients import all_reduce, to_tensors

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
    def of_keras(
        self, note: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Within it Keras's losses are reduced as the user's own are.

        Args:
            note: called for each that Keras reduces over rows.
        """
        if self.replicas == 1:
            yield
            return

        def scale(value):
            note()
            return self._of_mean(value)

        def reduce(own, values, *args, **kwargs):
            # A loss may be a number of Python.
            values = keras.ops.convert_to_tensor(values)
            reduced = self._reduced(own, values, *args, **kwargs)
            if len(values.shape) and not len(reduced.shape):
                note()
            return reduced

        def add(own, model, loss):
            if not len(loss.shape):
                return own(model, loss)
            # Keras takes the sum over rows.
            note()
            return self._of_sum(keras.ops.sum(loss))

        with keras_internals.losses_of_replica_replaced(
            scale, self._to_mean, reduce, add
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


class _PartOfTape(Part):
    """The part that this replica has, where the user's own tape is behind it.

    What a step returns or puts into a mean of its metrics is averaged over
    replicas, so losses are so many times their part, and the gradients divided
    by it.
    """

    def __init__(self):
        super().__init__("sum")

    def _of_mean(self, value: tf.Tensor) -> tf.Tensor:
        return self.logged(super()._of_mean(value))

    def _to_mean(self, value: tf.Tensor) -> tf.Tensor:
        return super()._to_mean(value) / self.replicas

    def _of_sum(self, value: tf.Tensor) -> tf.Tensor:
        return self.logged(value)


class OwnStep:
    """A `train_step` of a model's own on several replicas.

    Keras divides what its losses return by the number of replicas, so that
    gradients of replicas, summed, are those of the batch where all have equally
    many rows, and logs of a loss are too small by it. Here both are those of
    the global batch, whatever each has. A loss that nothing of Keras's reduces
    stays as it is written, which is said.

    Args:
        model: whose step it is.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self._is_reduced = False
        self._is_said = False
        # A function of the user's own may be traced for one replica only.
        self._with_parts: set[int] = set()

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Within it this thread is in the step, in a replica."""
        part = _PartOfTape()
        if part.replicas == 1:
            yield
            return
        before = getattr(_known, "step", None)
        _known.step = self
        try:
            with (
                part.of_keras(self._note),
                keras_internals.updates_replaced(self._apply_plainly),
            ):
                yield
        finally:
            _known.step = before

    def losses_kept(self) -> contextlib.AbstractContextManager[None]:
        """Within it other replicas may call layers: they clear `losses`."""
        layers = keras_internals.all_layers(self._model)
        return keras_internals.additional_losses_kept(layers)

    def takes_part(self, optimizer: keras.optimizers.Optimizer) -> None:
        """Gradients of this optimizer are parts of the batch's already."""
        each = [optimizer, *keras_internals.single_optimizers(optimizer)]
        self._with_parts |= set(map(id, each))

    def divided(self, optimizer: Any, gradients: list[Any]) -> list[Any]:
        """Gradients of an own tape, ready to be summed over replicas."""
        if id(optimizer) in self._with_parts:
            return gradients
        if not self._is_reduced:
            self._say()
            return gradients
        return [_times(g, 1.0 / _replicas()) for g in gradients]

    def _apply_plainly(
        self, own, optimizer, grads, trainable_variables=None
    ) -> None:
        """In place of `apply` of Keras's optimizers, which clip before the sum.

        Then the gradient of the batch would not be what is clipped.
        """
        if not keras_internals.takes_reduced_gradients(optimizer):
            variables = keras_internals.optimized_variables(optimizer)
            if trainable_variables is not None:
                variables = trainable_variables = list(trainable_variables)
            overwrites = [
                keras_internals.overwrites_with_gradient(variable)
                for variable in variables
            ]
            grads = to_tensors(grads)
            divided = self.divided(optimizer, grads)
            # What is a next value and no gradient is no part of a sum.
            grads = [
                before if is_next else part
                for before, part, is_next in zip(
                    grads, divided, overwrites, strict=True
                )
            ]
            grads = all_reduce(grads, overwrites)
        with keras_internals.gradients_already_reduced(optimizer):
            own(optimizer, grads, trainable_variables)

    def _note(self) -> None:
        self._is_reduced = True

    def _say(self) -> None:
        if self._is_said:
            return
        self._is_said = True
        replicas = _replicas()
        logging.warning(
            "train_step of %s sums gradients over %d replicas, and Keras "
            "reduces no loss in it: unless it divides by their number, a mean "
            "counts %d times. tfamp.value_and_gradients takes the mean of the "
            "global batch.",
            type(self._model).__name__,
            replicas,
            replicas,
        )


def divided_in_own_step(
    optimizer: keras.optimizers.Optimizer, gradients: list[Any]
) -> list[Any]:
    """Gradients as they are, but those of a tape in an `OwnStep`."""
    step = getattr(_known, "step", None)
    return gradients if step is None else step.divided(optimizer, gradients)


def takes_its_part(optimizer: keras.optimizers.Optimizer) -> None:
    """Notes that its gradients are parts of the batch's in an `OwnStep`."""
    step = getattr(_known, "step", None)
    if step is not None:
        step.takes_part(optimizer)


def _times(gradient: Any, factor: float) -> Any:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            gradient.values * tf.cast(factor, gradient.values.dtype),
            gradient.indices,
            gradient.dense_shape,
        )
    return gradient * tf.cast(factor, gradient.dtype)


def _over_replicas(count: tf.Tensor) -> tf.Tensor:
    replica = tf.distribute.get_replica_context()
    step = getattr(_known, "step", None)
    kept = contextlib.nullcontext() if step is None else step.losses_kept()
    try:
        with kept:
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
