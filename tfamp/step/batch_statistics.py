"""Batch normalization's averages, of a share that is trained on in pieces.

Each piece is normalized by its own mean and variance, and would move the
averages by its own momentum. Every piece moves them from where they were before
the step instead; what they are after it follows from the statistics of all
rows: the mean of the pieces' means, and the mean of their variances plus the
variance of their means.
"""

import dataclasses
from typing import NamedTuple

import keras
import tensorflow as tf

from tfamp import keras_internals


@dataclasses.dataclass(frozen=True)
class _Averages:
    """What a batch normalization moves, and how fast."""

    mean: tf.Variable
    variance: tf.Variable
    momentum: float

    def now(self) -> tuple[tf.Tensor, tf.Tensor]:
        # A cast to the format that it has would give the variable itself.
        mean, variance = map(tf.convert_to_tensor, (self.mean, self.variance))
        return tf.cast(mean, tf.float32), tf.cast(variance, tf.float32)

    def set(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
        self.mean.assign(tf.cast(mean, self.mean.dtype))
        self.variance.assign(tf.cast(variance, self.variance.dtype))


class _Moved(NamedTuple):
    """float32 [C]: the averages, of the pieces so far.

    mean: as moved by the mean of their rows.
    spread: the squared deviations of the pieces from it, times their rows.
    variance: as moved by the mean of their variances.
    """

    mean: tf.Tensor
    spread: tf.Tensor
    variance: tf.Tensor


class State(NamedTuple):
    """What pieces so far came to.

    rows: float32; how many they had.
    moved: of each layer.
    """

    rows: tf.Tensor
    moved: list[_Moved]


class BatchStatistics:
    """The averages of a model's batch normalizations, over one step's pieces.

    It is to be made, and its methods called, in the graph of a step. Left out
    is renormalization, whose averages are not linear in the statistics.
    """

    def __init__(self, model: keras.Model):
        self._layers = [
            _Averages(
                layer.moving_mean.value,
                layer.moving_variance.value,
                layer.momentum,
            )
            for layer in keras_internals.all_layers(model)
            if isinstance(layer, keras.layers.BatchNormalization)
            and layer.built
            and not keras_internals.renormalizes(layer)
        ]
        self._before = [each.now() for each in self._layers]

    def start(self) -> State:
        """Before the first piece."""
        return State(
            tf.constant(0.0),
            [
                _Moved(mean, tf.zeros_like(mean), variance)
                for mean, variance in self._before
            ],
        )

    def after_piece(self, state: State, rows: tf.Tensor) -> State:
        """Takes what a piece of so many rows moved, and moves it back."""
        added = tf.cast(rows, tf.float32)
        total = state.rows + added
        part = tf.math.divide_no_nan(added, total)

        def share(change: tf.Tensor) -> tf.Tensor:
            # What has no row may hold no number.
            return tf.math.multiply_no_nan(change, part)

        moved = []
        for layer, before, one in zip(
            self._layers, self._before, state.moved, strict=True
        ):
            mean, variance = layer.now()
            off = mean - one.mean
            moved.append(
                _Moved(
                    one.mean + share(off),
                    one.spread + share(off * off) * state.rows,
                    one.variance + share(variance - one.variance),
                )
            )
            layer.set(*before)
        return State(total, moved)

    def settle(self, state: State) -> None:
        """After the last piece."""
        for layer, one in zip(self._layers, state.moved, strict=True):
            # The means moved by 1 - momentum, the square of it is in here.
            spread = tf.math.divide_no_nan(
                one.spread, state.rows * (1.0 - layer.momentum)
            )
            layer.set(one.mean, one.variance + spread)
