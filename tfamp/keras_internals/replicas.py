"""What Keras adds up over replicas."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from tfamp.keras_internals.replacing import of_threads, own_function


def is_made_in_scope(model: keras.Model) -> bool:
    """Whether the model was made within a `strategy.scope()`."""
    return model._distribute_strategy is not None


@contextlib.contextmanager
def losses_of_replica_replaced(
    scale: Callable, unscale: Callable, reduce: Callable, add: Callable
) -> Iterator[None]:
    """Within it, this thread's losses are scaled and reduced by functions.

    Args:
        scale: takes a mean, in the place of dividing it by the number of
            replicas.
        unscale: undoes that.
        reduce: takes Keras's own function, which reduces losses and scales
            means, and its arguments: losses, weights, mask, reduction, dtype.
        add: takes Keras's own function, which sums what `add_loss` got and
            scales it, a model and one such loss.
    """
    module = keras.src.losses.loss
    trainer = keras.src.backend.tensorflow.trainer.TensorFlowTrainer
    own_add = own_function(vars(trainer)["_aggregate_additional_loss"])
    own = vars(module)["reduce_weighted_values"]
    with contextlib.ExitStack() as stack:
        for name, function in (
            ("scale_loss_for_distribution", scale),
            ("unscale_loss_for_distribution", unscale),
            (
                "reduce_weighted_values",
                functools.partial(reduce, own_function(own)),
            ),
        ):
            stack.enter_context(of_threads(module, name).replaced(function))
        stack.enter_context(
            of_threads(trainer, "_aggregate_additional_loss").replaced(
                functools.partial(add, own_add)
            )
        )
        yield


@contextlib.contextmanager
def divisions_noted(noted: list[tf.Tensor]) -> Iterator[None]:
    """Within it, `noted` gets what Keras makes ready to add up over replicas.

    Sums of its losses, and means that it divides by their number.
    """
    module = keras.src.losses.loss
    own_scale = own_function(vars(module)["scale_loss_for_distribution"])
    own_reduce = own_function(vars(module)["reduce_weighted_values"])

    def scale(value):
        noted.append(tf.identity(own_scale(value)))
        return noted[-1]

    def reduce(values, *args, **kwargs):
        reduced = own_reduce(values, *args, **kwargs)
        if len(values.shape) == 0:
            # Reduced by the user.
            return reduced
        noted.append(tf.identity(reduced))
        return noted[-1]

    with (
        of_threads(module, "scale_loss_for_distribution").replaced(scale),
        of_threads(module, "reduce_weighted_values").replaced(reduce),
    ):
        yield


@contextlib.contextmanager
def updates_replaced(function: Callable) -> Iterator[None]:
    """Within it, this thread's optimizers apply gradients by this.

    Args:
        function: takes Keras's own `apply`, the optimizer, gradients, and
            variables or None.
    """
    owner = keras.src.optimizers.base_optimizer.BaseOptimizer
    own = own_function(vars(owner)["apply"])
    with of_threads(owner, "apply").replaced(functools.partial(function, own)):
        yield
