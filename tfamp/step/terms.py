"""The terms of a loss, taken apart so that pieces of a batch add up.

Keras weighs a masked or weighted mean inside each call by the entries that
count there. The mean of such means is not the mean of the batch. A term is
therefore numerator and denominator here; a piece's numerator is divided by
the denominator of the global batch.

All values follow one convention: the mean of the pieces' losses, weighted by
the pieces' rows, is the loss of the global batch.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.scaling.own_loss import count_of_mean

# How a term of the pieces makes that of the batch.
RATIO = "ratio"  # sum of numerators by sum of denominators
MEAN = "mean"  # the mean over the pieces' rows
SUM = "sum"  # the sum over pieces
EACH = "each"  # one number per entry, left to the caller to sum


class Leaf(NamedTuple):
    """One loss of `compile`, on the rows at hand.

    numerator: sum of the weighted losses; for EACH all of them.
    denominator: what Keras divides it by.
    kind: one of the above, as far as the reduction tells.
    is_counted: whether the denominator depends on masks or weights.
    is_known: whether it is a loss of Keras's own, which needs no trial.
    """

    name: str
    numerator: tf.Tensor
    denominator: tf.Tensor
    kind: str
    is_counted: bool
    is_known: bool
    is_scalar_with_weights: bool


class Plan(NamedTuple):
    """What each term is, in the order in which a pass meets them.

    leaves: a kind for each loss of `compile`.
    counted: for each of those whether its denominator must be counted.
    added: a kind for each loss of `add_loss` and each regularizer.
    total: the kind of what `compute_loss` returns, given all that.
    leaf_factors: what undoes a division by the number of replicas that a
        loss made itself; empty for none. So are the other factors.
    """

    leaves: tuple[str, ...]
    counted: tuple[bool, ...]
    added: tuple[str, ...]
    total: str = MEAN
    leaf_factors: tuple[int, ...] = ()
    added_factors: tuple[int, ...] = ()
    total_factor: int = 1


class Terms:
    """What one pass over some rows met."""

    def __init__(self):
        self.leaves: list[Leaf] = []
        self.added: list[tf.Tensor] = []


def leaf_of(loss: Any, y_true, y_pred, sample_weight) -> Leaf:
    """A loss on some rows, before Keras divides."""
    name = getattr(loss, "name", type(loss).__name__)
    is_known = keras_internals.is_loss_of_rows(loss)
    parts = keras_internals.unreduced_loss(loss, y_true, y_pred, sample_weight)
    if parts is None:
        # Its `__call__` is its own: a number is all that is known.
        value = tf.convert_to_tensor(loss(y_true, y_pred, sample_weight))
        kind = MEAN if value.shape.rank == 0 else EACH
        one = tf.ones([], value.dtype)
        return Leaf(name, value, one, kind, False, False, False)
    values, weights, mask, is_scalar = parts
    reduction = loss.reduction
    dtype = values.dtype
    one = tf.ones([], dtype)
    if values.shape.rank == 0:
        # Of all rows at once, as Dice: what it is shows on pieces.
        return Leaf(name, values, one, MEAN, False, False, False)
    is_scalar = is_scalar and (weights is not None)
    if reduction in (None, "none"):
        return Leaf(name, values, one, EACH, False, is_known, is_scalar)
    total = tf.reduce_sum(values)
    if reduction == "sum":
        return Leaf(name, total, one, SUM, False, is_known, is_scalar)
    count, is_counted = count_of_mean(values, weights, mask, reduction)
    return Leaf(name, total, count, RATIO, is_counted, is_known, is_scalar)


@contextlib.contextmanager
def recorded(model: keras.Model) -> Iterator[Terms]:
    """Within it, `compute_loss` writes its terms down, and counts nothing."""
    terms = Terms()

    def leaf(loss, y_true, y_pred, sample_weight):
        found = leaf_of(loss, y_true, y_pred, sample_weight)
        terms.leaves.append(found)
        if found.kind == EACH:
            return found.numerator
        return tf.math.divide_no_nan(found.numerator, found.denominator)

    def add(loss):
        terms.added.append(tf.reduce_sum(loss))
        return terms.added[-1]

    with keras_internals.loss_terms_replaced(model, leaf, add, _ignore):
        yield terms


@contextlib.contextmanager
def shared(
    model: keras.Model,
    plan: Plan,
    share: tf.Tensor,
    denominators: Sequence[tf.Tensor],
) -> Iterator[None]:
    """Within it, `compute_loss` gives a piece its part of the global loss.

    Args:
        model: compiled and built.
        plan: what its terms are.
        share: the part of the global batch's rows that the piece holds.
        denominators: of the global batch, of the counted losses, in order.
    """
    ones = itertools.repeat(1)
    remaining = iter(
        zip(
            plan.leaves,
            plan.counted,
            plan.leaf_factors or ones,
            strict=False,
        )
    )
    counts = iter(denominators)
    kinds = iter(zip(plan.added, plan.added_factors or ones, strict=False))

    def scaled(value, kind):
        return value / tf.cast(share, value.dtype) if kind == SUM else value

    def leaf(loss, y_true, y_pred, sample_weight):
        kind, is_counted, factor = next(remaining)
        found = leaf_of(loss, y_true, y_pred, sample_weight)
        if kind == EACH:
            return found.numerator
        if is_counted and kind == RATIO:
            count = tf.cast(next(counts), found.numerator.dtype)
            value = tf.math.divide_no_nan(scaled(found.numerator, SUM), count)
            return value * factor
        value = tf.math.divide_no_nan(found.numerator, found.denominator)
        return scaled(value, kind) * factor

    def add(loss):
        kind, factor = next(kinds)
        return scaled(tf.reduce_sum(loss), kind) * factor

    def count(metric, value) -> None:
        # Keras counts batches here, and so do parts of a batch.
        metric.update_state(tf.reduce_mean(value), sample_weight=share)

    with keras_internals.loss_terms_replaced(model, leaf, add, count):
        yield


def run_unseen(
    model: keras.Model, function: Callable[[], Any], is_moved: bool = False
) -> Any:
    """Calls a function of the model that leaves no trace in its variables.

    Args:
        model: whose variables stay.
        function: what is called.
        is_moved: lets it see weights that are moved a little.
    """
    if is_moved:
        values = [
            (v, _moved(v, i)) for i, v in enumerate(model.trainable_variables)
        ]
    else:
        # Keras looks for regularized weights in the scope only.
        values = [
            (v, tf.convert_to_tensor(v.value))
            for v in model.trainable_variables
            if getattr(v, "regularizer", None) is not None
        ]
    with (
        keras_internals.additional_losses_kept(
            keras_internals.all_layers(model)
        ),
        keras.StatelessScope(values, collect_losses=True),
    ):
        return function()


def _moved(variable: keras.Variable, seed: int) -> tf.Tensor:
    value = tf.convert_to_tensor(variable.value)
    noise = tf.random.stateless_normal(value.shape, [seed, 1])
    return value + tf.cast(0.05 * noise, value.dtype)


def _ignore(metric, value) -> None:
    del metric, value
