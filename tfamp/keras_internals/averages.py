"""Moving averages of weights (`use_ema`), and when they take their place."""

import contextlib
from collections.abc import Iterator

import keras

from tfamp.keras_internals.optimizers import single_optimizers


def averaging_optimizers(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.optimizers.Optimizer]:
    """Those that keep moving averages (`use_ema`): itself, or what it holds.

    A `MultiOptimizer` keeps none; the optimizers in it may. One of those that
    got no variable is not built, and has none.
    """
    return [
        each
        for each in single_optimizers(optimizer)
        if each.use_ema and each.built
    ]


def leaves_averages(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `finalize_variable_values` puts averages in the weights' place.

    Args:
        optimizer: one with a scaler around it, or without.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return bool(averaging_optimizers(inner))


@contextlib.contextmanager
def average_overwrite_deferred(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[list[tuple[keras.optimizers.Optimizer, int]]]:
    """Yields the optimizers with an `ema_overwrite_frequency`, and that.

    Within it `apply` ignores the frequencies: Keras overwrites the weights
    with their averages in a `tf.cond` of the replica context, which fails
    under a strategy of several replicas.
    """
    frequencies = [
        (each, each.ema_overwrite_frequency)
        for each in averaging_optimizers(optimizer)
        if each.ema_overwrite_frequency
    ]
    for each, _ in frequencies:
        object.__setattr__(each, "ema_overwrite_frequency", None)
    try:
        yield frequencies
    finally:
        for each, frequency in frequencies:
            object.__setattr__(each, "ema_overwrite_frequency", frequency)


def moving_averages(
    optimizer: keras.optimizers.Optimizer,
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Pairs of a trainable variable and its moving average (`use_ema`)."""
    return [
        (variable, average)
        for variable, average in zip(
            optimizer._trainable_variables,
            optimizer._model_variables_moving_average,
            strict=True,
        )
        if average is not None
    ]
