"""Takes the losses and gradients of a step before its optimizers do."""

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence

import tensorflow as tf

from tfamp import keras_internals
from tfamp.overflow.first import Point
from tfamp.overflow.marks import size_of
from tfamp.scaling import gradients as gradients_lib
from tfamp.scaling.optimizer import LossScaleOptimizer
from tfamp.taps.gates import gate


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
        self._thread = threading.local()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, what the optimizers get goes through here."""
        with contextlib.ExitStack() as stack:
            for each in self._optimizers:
                apply = functools.partial(self._apply, each)
                stack.enter_context(gate(each, "apply", apply))
                stack.enter_context(gate(each, "scale_loss", self._scale_loss))
            yield

    @contextlib.contextmanager
    def catching(self, caught: Caught) -> Iterator[None]:
        """Within it, this thread's losses and gradients are caught."""
        self._thread.caught = caught
        try:
            yield
        finally:
            del self._thread.caught

    @property
    def _caught(self) -> Caught | None:
        return getattr(self._thread, "caught", None)

    def _apply(self, optimizer, call, grads, trainable_variables=None) -> None:
        if self._caught is None:
            call(grads, trainable_variables)
            return
        variables = trainable_variables
        if variables is None:
            variables = keras_internals.optimized_variables(optimizer)
        self._caught.applied.append((optimizer, list(grads), list(variables)))

    def _scale_loss(self, call, loss):
        if self._caught is not None:
            self._caught.losses.append(size_of(loss))
        return call(loss)


def _weight_point(variable, owners, gradient) -> Point:
    place = owners.get(id(variable))
    if place is None:
        return Point(variable.path, None, gradient.dtype.name)
    # The gradient of a float32 weight is one of its 16-bit copy, cast.
    return Point(variable.path, place.path, place.layer.compute_dtype)
