"""Steps that were not finite: noticed, logged, and explained when they stay.

Looking costs a read of three scalars, where training looks up anyway to
report; no step waits for it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfamp import keras_internals
from tfamp.errors import InputError, LossScaleError
from tfamp.loss_scale import LossScaleOptimizer, value_and_gradients

ACTIONS = ("log", "ignore", "stop")

# Overflows in a row at the floor of the scale until training is given up: a
# few bad batches are survivable, a model that is broken is not.
PATIENCE_AT_FLOOR = 20

# Batches that are tried again to find what is not finite.
_REPLAYED_BATCHES = 8


class OverflowWatch:
    """Follows the loss scales of a training run.

    Args:
        optimizers: by the name of the attribute that holds it; a GAN has two.
        action: "log" a line about skipped steps, "ignore" them, or "stop".
        explain: says what overflows, in a sentence; called before stopping.

    Raises:
        InputError: for an unknown action.
    """

    def __init__(
        self,
        optimizers: Mapping[str, LossScaleOptimizer],
        action: str,
        explain: Callable[[], str],
    ):
        if action not in ACTIONS:
            raise InputError(
                f"Unknown on_overflow {action!r}; expected one of "
                f"{', '.join(ACTIONS)}."
            )
        self._optimizers = optimizers
        self._action = action
        self._explain = explain
        self._seen = self._skipped()
        self._at_epoch_begin = dict(self._seen)

    def begin_epoch(self, skipped: Mapping[str, int] | None = None) -> None:
        """From here on, `logs` counts the skipped steps of a new epoch.

        Args:
            skipped: what `skipped_at_epoch_begin` was in the run that this
                one resumes in the middle of an epoch.
        """
        # Restored counts are no news.
        self._seen = self._skipped()
        self._at_epoch_begin = dict(skipped or self._seen)

    @property
    def skipped_at_epoch_begin(self) -> dict[str, int]:
        """Skipped steps of the whole run, by optimizer, up to this epoch."""
        return dict(self._at_epoch_begin)

    def logs(self) -> dict[str, float]:
        """`loss_scale` and `skipped_steps`, with a suffix if they are many."""
        skipped = self._skipped()
        logs = {}
        for name, optimizer in self._optimizers.items():
            suffix = "" if len(self._optimizers) == 1 else f"_{name}"
            logs[f"loss_scale{suffix}"] = float(optimizer.dynamic_scale.numpy())
            logs[f"skipped_steps{suffix}"] = (
                skipped[name] - self._at_epoch_begin[name]
            )
        return logs

    def check(self, where: str) -> None:
        """Acts on steps that were skipped since the last check.

        Args:
            where: the place in training, for the message.

        Raises:
            LossScaleError: where `action` is "stop" and a step was skipped,
                or where the scale is at its floor and overflows stay.
        """
        skipped = self._skipped()
        for name, optimizer in self._optimizers.items():
            new = skipped[name] - self._seen[name]
            if not new:
                continue
            scale = float(optimizer.dynamic_scale.numpy())
            in_a_row = int(optimizer.consecutive_skips.numpy())
            at_floor = not optimizer.dynamic or (
                scale <= optimizer.rule.min_scale
            )
            if at_floor and in_a_row >= PATIENCE_AT_FLOOR:
                raise LossScaleError(
                    f"{where}: {in_a_row} steps in a row are not finite, and "
                    f"the loss scale is at its floor of {scale:g}. "
                    f"{self._explain()}"
                )
            if self._action == "stop":
                raise LossScaleError(
                    f"{where}: {new} step(s) were not finite at loss scale "
                    f"{scale:g}, and on_overflow is 'stop'. {self._explain()}"
                )
            if self._action == "log":
                logging.warning(
                    "%s: skipped %d step(s) that were not finite; the loss "
                    "scale%s is now %g.",
                    where,
                    new,
                    "" if len(self._optimizers) == 1 else f" of {name}",
                    scale,
                )
        self._seen = skipped

    def _skipped(self) -> dict[str, int]:
        return {
            name: int(optimizer.skipped_steps.numpy())
            for name, optimizer in self._optimizers.items()
        }


def explain(model: keras.Model, batches: Iterable[Any]) -> str:
    """Says what is not finite first, by trying batches again, eagerly.

    The model's state is as before when this returns.

    Args:
        model: compiled, with Keras's own `train_step`.
        batches: batches `(x, y)` or `(x, y, sample_weight)`.

    Returns:
        A sentence that names the place and what is at fault: the data, the
        weights, the forward pass, the loss, the backward pass, or the scale.
    """
    state = [(v, v.numpy()) for v in model.non_trainable_variables]
    try:
        with keras_internals.additional_losses_in_float32(model):
            for _, batch in zip(
                range(_REPLAYED_BATCHES), batches, strict=False
            ):
                culprit = _first_non_finite(model, batch)
                if culprit:
                    return culprit
    finally:
        for variable, value in state:
            variable.assign(value)
    return f"Trying {_REPLAYED_BATCHES} batches again did not reproduce it."


def _first_non_finite(model: keras.Model, batch: Any) -> str | None:
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    for name, tensors in {
        "inputs": x,
        "targets": y,
        "sample weights": sample_weight,
    }.items():
        if not _is_finite(tensors):
            return f"The data are at fault: the {name} hold inf or NaN."
    for variable in model.weights:
        if not _is_finite(variable.value):
            return (
                f"The weights are at fault: {variable.path} holds inf or NaN "
                "already."
            )
    order: list[tuple[str, bool]] = []
    loss = None

    def compute_loss():
        nonlocal loss
        with _recorded_outputs(model, order):
            outputs = model(x, training=True)
        loss = model.compute_loss(
            x=x, y=y, y_pred=outputs, sample_weight=sample_weight
        )
        return loss

    optimizer = model.optimizer
    _, gradients = value_and_gradients(
        compute_loss, model.trainable_variables, optimizer
    )
    for path, is_finite in order:
        if not is_finite:
            return (
                "The forward pass is at fault: the first output that is not "
                f"finite is that of layer {path}."
            )
    if not _is_finite(loss):
        return (
            "The loss is at fault: the model's outputs are finite, it is not."
        )
    # The backward pass goes from the last layer to the first.
    for variable, gradient in reversed(
        list(zip(model.trainable_variables, gradients, strict=True))
    ):
        if not _is_finite(gradient):
            return _blame_backward(
                variable.path, compute_loss, model.trainable_variables
            )
    return None


def _blame_backward(path: str, compute_loss, variables) -> str:
    unscaled = keras.optimizers.SGD()
    _, gradients = value_and_gradients(compute_loss, variables, unscaled)
    if all(map(_is_finite, gradients)):
        return (
            f"Only the scaling is at fault: the gradient of {path} is finite "
            "without it; lower min_scale."
        )
    return (
        "The backward pass is at fault: the first gradient that is not finite "
        f"is that of {path}."
    )


@contextlib.contextmanager
def _recorded_outputs(
    model: keras.Model, order: list[tuple[str, bool]]
) -> Iterator[None]:
    """Within it, each layer notes its path and whether its output is finite.

    An inner layer ends before the one that holds it, and so comes first.
    """
    layers = keras_internals.all_layers(model)
    for layer in layers:
        object.__setattr__(layer, "call", _recording(layer, order))
    try:
        yield
    finally:
        for layer in layers:
            object.__delattr__(layer, "call")


def _recording(layer: keras.layers.Layer, order: list[tuple[str, bool]]):
    original = layer.call

    def call(*args, **kwargs):
        outputs = original(*args, **kwargs)
        order.append((layer.path, _is_finite(outputs)))
        return outputs

    return call


def _is_finite(tensors: Any) -> bool:
    return all(
        np.isfinite(
            keras.ops.convert_to_numpy(keras.ops.cast(t, "float32"))
        ).all()
        # The values of ragged and sparse tensors are tensors of their own.
        for t in tf.nest.flatten(tensors, expand_composites=True)
        if t is not None and tf.convert_to_tensor(t).dtype.is_floating
    )
