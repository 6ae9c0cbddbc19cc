"""Takes the losses and gradients of a step before its optimizers do."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import tensorflow as tf

from tfamp import keras_internals
from tfamp.overflow.first import Point
from tfamp.overflow.taps import size_of
from tfamp.scaling import gradients as gradients_lib
from tfamp.scaling.optimizer import LossScaleOptimizer


class Caught:
    """What a step gave to its optimizers, on one replica."""

    def __init__(self):
        self.losses: list[tf.Tensor] = []
        self.applied: list[tuple[LossScaleOptimizer, list, list]] = []

    def gradients(self, owners) -> list[tuple[Point, tf.Tensor]]:
        return [
            (_weight_point(variable, owners, gradient), size_of(gradient))
            for _, gradients, variables in self.applied
            for gradient, variable in zip(gradients, variables, strict=True)
            if gradient is not None
        ]

    def sums(self, owners) -> list[tuple[Point, tf.Tensor]]:
        return [
            (
                _weight_point(variable, owners, gradient)._replace(
                    dtype=optimizer.all_reduce_dtype or gradient.dtype.name
                ),
                size_of(gradient),
            )
            for optimizer, gradients, variables in self.applied
            for gradient, variable in zip(
                gradients_lib.all_reduce(
                    gradients,
                    [
                        keras_internals.overwrites_with_gradient(v)
                        for v in variables
                    ],
                    optimizer.all_reduce_dtype,
                ),
                variables,
                strict=True,
            )
            if gradient is not None
        ]


class Catch:
    """Takes losses and gradients off a step, so that none are applied."""

    def __init__(self, optimizers: Sequence[LossScaleOptimizer]):
        self._optimizers = optimizers
        # Each replica is traced in a thread of its own.
        self._caught: dict[int, Caught] = {}

    def begin(self) -> Caught:
        caught = self._caught[threading.get_ident()] = Caught()
        return caught

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        for optimizer in self._optimizers:
            object.__setattr__(optimizer, "apply", self._apply(optimizer))
            object.__setattr__(
                optimizer, "scale_loss", self._scale_loss(optimizer)
            )
        try:
            yield
        finally:
            for optimizer in self._optimizers:
                object.__delattr__(optimizer, "apply")
                object.__delattr__(optimizer, "scale_loss")

    def _apply(self, optimizer: LossScaleOptimizer):
        def apply(grads, trainable_variables=None) -> None:
            variables = trainable_variables
            if variables is None:
                variables = keras_internals.optimized_variables(optimizer)
            self._caught[threading.get_ident()].applied.append(
                (optimizer, list(grads), list(variables))
            )

        return apply

    def _scale_loss(self, optimizer: LossScaleOptimizer):
        original = optimizer.scale_loss

        def scale_loss(loss):
            self._caught[threading.get_ident()].losses.append(size_of(loss))
            return original(loss)

        return scale_loss


def _weight_point(variable, owners, gradient) -> Point:
    place = owners.get(id(variable))
    if place is None:
        return Point(variable.path, None, gradient.dtype.name)
    # The gradient of a float32 weight is one of its 16-bit copy, cast.
    return Point(variable.path, place.path, place.layer.compute_dtype)
