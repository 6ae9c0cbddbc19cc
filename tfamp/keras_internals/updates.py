"""What an optimizer does to a gradient on its way to the variable."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp.keras_internals.optimizers import single_optimizers
from tfamp.keras_internals.replacing import methods_replaced


@contextlib.contextmanager
def gradients_already_reduced(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[None]:
    """Within it, the optimizer takes its gradients as they are.

    Keras optimizers sum gradients over replicas inside `apply`, after they
    clipped them. tfamp reduces first, and a second sum would multiply the
    gradient by the number of replicas.
    """
    with contextlib.ExitStack() as stack:
        for each in [optimizer, *getattr(optimizer, "optimizers", ())]:
            stack.enter_context(
                methods_replaced(each, _all_reduce_sum_gradients=list)
            )
        yield


def takes_reduced_gradients(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the optimizer is within `gradients_already_reduced`."""
    return "_all_reduce_sum_gradients" in vars(optimizer)


@contextlib.contextmanager
def schedules_on_host(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Within it, learning rates of schedules are computed on the host.

    The count of steps that they depend on is there already, and where they
    branch, no one waits for a device to say which way.
    """

    def on_host(rate):
        def computed():
            with tf.device("CPU:0"):
                return rate()

        return computed

    with contextlib.ExitStack() as stack:
        for each in single_optimizers(optimizer):
            schedule = keras.optimizers.schedules.LearningRateSchedule
            if isinstance(each._learning_rate, schedule):
                rate = on_host(each._get_current_learning_rate)
                stack.enter_context(
                    methods_replaced(each, _get_current_learning_rate=rate)
                )
        yield


@contextlib.contextmanager
def gradients_already_clipped(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[None]:
    """Within it, the optimizer does not clip its gradients."""
    with methods_replaced(optimizer, _clip_gradients=list):
        yield


def clipped(
    optimizer: keras.optimizers.Optimizer, gradients: Sequence[Any]
) -> list[Any]:
    """The gradients, clipped as `apply` would; None stays None."""
    present = [each for each in gradients if each is not None]
    values = iter(optimizer._clip_gradients(present))
    return [None if each is None else next(values) for each in gradients]


def global_clip_norm(optimizer: keras.optimizers.Optimizer) -> float | None:
    """The global norm that `apply` clips each gradient it gets to, or None.

    None also where gradients are summed up before they are clipped, and where
    a subclass clips in its own way.
    """
    clips_as_keras = (
        getattr(type(optimizer), "_clip_gradients", None)
        is keras.optimizers.Optimizer._clip_gradients
    )
    if (
        not clips_as_keras
        or optimizer.clipnorm
        or optimizer.gradient_accumulation_steps
        or getattr(optimizer, "optimizers", None)
    ):
        return None
    return optimizer.global_clipnorm


@contextlib.contextmanager
def update_replaced(
    optimizer: keras.optimizers.Optimizer, update: Callable
) -> Iterator[None]:
    """Within it, `apply` decays and updates each variable by `update`.

    Args:
        optimizer: no `MultiOptimizer`.
        update: called with a gradient, its `tf.Variable` and the learning
            rate, on the variable's device.
    """
    with methods_replaced(
        optimizer,
        update_step=update,
        _apply_weight_decay=lambda variables: None,
    ):
        yield


def updates_as(
    optimizer: keras.optimizers.Optimizer,
    cls: type[keras.optimizers.Optimizer],
) -> bool:
    """Whether it updates and decays a variable by the methods of that class."""
    return all(
        getattr(type(optimizer), name) is getattr(cls, name)
        and name not in vars(optimizer)
        for name in ("update_step", "_apply_weight_decay", "_use_weight_decay")
    )


def decays(optimizer: keras.optimizers.Optimizer, variable) -> bool:
    """Whether weight decay applies to the variable."""
    return bool(optimizer.weight_decay) and optimizer._use_weight_decay(
        variable
    )
