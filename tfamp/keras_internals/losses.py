"""What losses compute up to where they reduce, and their terms replaced."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfamp.keras_internals.layers import mask_of
from tfamp.keras_internals.replacing import methods_replaced, of_threads

# Losses of Keras's that look at all rows of a batch at once.
_ACROSS_ROWS = ("circle", "dice", "tversky")


def is_loss_of_rows(loss: Any) -> bool:
    """Whether it is a loss of Keras's that takes each row by itself."""
    makers = [type(loss), getattr(loss, "fn", type(loss))]
    return all(
        str(getattr(maker, "__module__", "")).startswith("keras.src.losses")
        and getattr(maker, "__name__", "").lower() not in _ACROSS_ROWS
        for maker in makers
    )


def unreduced_loss(
    loss: Any, y_true, y_pred, sample_weight
) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor | None, bool] | None:
    """What `Loss.__call__` computes, up to where it would reduce.

    Returns:
        The losses times their weights, masked ones 0; those weights or None;
        the mask or None; and whether the loss itself was a single number.
        None for what has a `__call__` of its own.
    """
    if (
        not isinstance(loss, keras.losses.Loss)
        or type(loss).__call__ is not keras.losses.Loss.__call__
    ):
        return None

    def cast(value):
        return keras.ops.convert_to_tensor(value, dtype=loss.dtype)

    masks = [mask_of(y_pred)]
    values = loss.call(
        keras.tree.map_structure(cast, y_true),
        keras.tree.map_structure(cast, y_pred),
    )
    masks.append(mask_of(values))
    masks = [mask for mask in masks if mask is not None]
    mask = masks[0] & masks[1] if len(masks) == 2 else (masks or [None])[0]
    values = cast(values)
    is_scalar = values.shape.rank == 0
    values, weights = weighted_values(
        values,
        None if sample_weight is None else cast(sample_weight),
        None if mask is None else cast(mask),
    )
    return values, weights, mask, is_scalar


def weighted_values(
    values: tf.Tensor, sample_weight: Any, mask: Any
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Losses times their weights, masked ones 0; and those weights or None."""
    module = keras.src.losses.loss
    # "sum" keeps the mask from being scaled by what counts here.
    weights = module.apply_mask(
        sample_weight, mask, dtype=values.dtype, reduction="sum"
    )
    if weights is not None:
        weights = keras.ops.cast(weights, values.dtype)
        values, weights = module.squeeze_or_expand_to_same_rank(values, weights)
        values = values * weights
    return values, weights


@contextlib.contextmanager
def additional_losses_in_float32(model: keras.Model) -> Iterator[None]:
    """Within it, losses of layers (`add_loss`) count in float32 at least.

    Keras takes them in the dtype they come in, and a float16 one cannot be
    added to the float32 loss of the outputs: a TypeError.
    """
    name = "_aggregate_additional_loss"
    own = vars(model).get(name)

    def aggregate_in_float32(loss):
        dtype = keras.backend.result_type(loss.dtype, "float32")
        loss = keras.ops.cast(loss, dtype)
        # A thread may replace that of the class, in the meantime.
        return own(loss) if own else getattr(type(model), name)(model, loss)

    with methods_replaced(
        model, _aggregate_additional_loss=aggregate_in_float32
    ):
        yield


@contextlib.contextmanager
def loss_terms_replaced(
    model: keras.Model, leaf: Callable, add: Callable, count: Callable
) -> Iterator[None]:
    """Within it, `compute_loss` makes its terms by other functions.

    None of them is divided by the number of replicas.

    Args:
        model: compiled and built.
        leaf: takes a loss of `compile`, labels, outputs and weights.
        add: takes a loss of `add_loss` or of a regularizer.
        count: takes the metric of a single output, and its loss.
    """

    def add_in_float32(loss):
        dtype = keras.backend.result_type(loss.dtype, "float32")
        return add(keras.ops.cast(loss, dtype))

    before = vars(model).get("_aggregate_additional_loss")
    object.__setattr__(model, "_aggregate_additional_loss", add_in_float32)
    losses = model._compile_loss
    # A `compute_loss` of the model's own may leave it alone, and unbuilt.
    losses = losses if losses is not None and losses.built else None
    saved = {}
    if losses is not None:
        saved = {
            name: vars(losses)[name] for name in ("_flat_losses", "_metrics")
        }
        losses._flat_losses = [
            each._replace(loss=functools.partial(leaf, each.loss))
            for each in losses._flat_losses
        ]
        losses._metrics = [
            _Counted(functools.partial(count, each)) for each in losses._metrics
        ]
    try:
        yield
    finally:
        if losses is not None:
            vars(losses).update(saved)
        if before is None:
            object.__delattr__(model, "_aggregate_additional_loss")
        else:
            object.__setattr__(model, "_aggregate_additional_loss", before)


@contextlib.contextmanager
def sparse_cross_entropy_replaced(function: Callable) -> Iterator[None]:
    """Within it, this thread's losses of integer labels compute by this.

    Keras checks shapes and casts, then calls TensorFlow by its public name,
    which is therefore what is replaced.

    Args:
        function: takes `labels` and `logits` as
            `tf.nn.sparse_softmax_cross_entropy_with_logits`.
    """
    name = "sparse_softmax_cross_entropy_with_logits"
    with of_threads(tf.nn, name).replaced(function):
        yield


class _Counted:
    """Stands in for the metric of a single output."""

    def __init__(self, count: Callable):
        self._count = count

    def update_state(self, value, sample_weight=None) -> None:
        del sample_weight
        # Keras has multiplied by what it believes it divided by.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self._count(value / replicas)
