"""What optimizers keep of each variable, and where it is found."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfamp.keras_internals.replacing import methods_replaced


def single_optimizers(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.optimizers.Optimizer]:
    """Itself, or those that a `MultiOptimizer` holds."""
    return getattr(optimizer, "optimizers", [optimizer])


def optimized_variables(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """What an optimizer was built with, and moves where it is told nothing."""
    return optimizer._trainable_variables


def variable_index(optimizer: keras.optimizers.Optimizer, variable) -> int:
    """The place of a variable among those that the optimizer was built with.

    Args:
        optimizer: built.
        variable: one of them, or the `tf.Variable` of a single replica.
    """
    return optimizer._get_variable_index(variable)


def adam_moments(
    adam: keras.optimizers.Adam, variable: tf.Variable
) -> tuple[tf.Variable, tf.Variable]:
    """First and second moment of a variable."""
    index = adam._get_variable_index(variable)
    return adam._momentums[index].value, adam._velocities[index].value


def sgd_momentum(
    sgd: keras.optimizers.SGD, variable: tf.Variable
) -> tf.Variable:
    """The momentum of a variable."""
    return sgd.momentums[sgd._get_variable_index(variable)].value


@contextlib.contextmanager
def variables_made_by(
    optimizer: keras.optimizers.Optimizer,
    make: Callable[[keras.Variable, str, Any], keras.Variable],
) -> Iterator[None]:
    """Within it, `build` makes the variables of each weight by a function.

    Args:
        optimizer: not built.
        make: takes a weight, the name of what is kept for it ("momentum"),
            and an initializer or its name.
    """

    def add(reference_variable, name=None, initializer="zeros"):
        with keras.name_scope(optimizer.name, caller=optimizer):
            variable = make(reference_variable, name or "var", initializer)
        optimizer._track_variable(variable)
        return variable

    with methods_replaced(optimizer, add_variable_from_reference=add):
        yield


def state_of_scaler(
    store: Mapping[str, Any], inner: keras.optimizers.Optimizer
) -> tuple[Any, Any, dict[str, Any]] | None:
    """What Keras's `LossScaleOptimizer` saved; None for anything else.

    Returns:
        The scale, the clean steps since it moved, and the state of the inner
        optimizer as that one would have saved it.
    """
    # Its iterations and learning rate, which it does not use, come first.
    own = ("iterations", "learning_rate", "step_counter", "dynamic_scale")
    count = len(inner.variables)
    if len(store.keys()) != len(own) + count:
        return None
    state = {str(i): store[str(i + len(own))] for i in range(count)}
    return store["3"], store["2"], state
