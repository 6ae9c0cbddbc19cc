"""What each step of a recipe's training lost, seen from outside."""

import math
from collections.abc import Mapping

import keras

from tfamp import keras_internals


class StepLosses(keras.callbacks.Callback):
    """Keeps the loss of every step, and the loss scale where it changes.

    It changes nothing of what it sees: the loss of a step is how much it
    moved the epoch's mean, times the weights. That mean is a float32 sum, so
    step n of an epoch is known to about n * 2**-24, relative to the mean.
    Where a call of the graph has several steps (a recipe's own
    `steps_per_loop`), the mean over these is kept under the last one's number.

    A model with a `train_step` of its own may leave Keras's loss alone. The
    first of its means whose name ends in "loss" is taken then, or else the
    first log of that name. Only scalars of the model's own logs are read.

    Attributes:
        losses: by step, from 1 over all calls of `fit`; None where no loss of
            it was finite.
        scale_changes: step and loss scale, where it is not that of the step
            before.
    """

    def __init__(self):
        super().__init__()
        self.losses: dict[int, float | None] = {}
        self.scale_changes: list[tuple[int, float]] = []
        self._steps_before = 0
        self._steps = 0

    def on_epoch_begin(self, epoch, logs=None):
        # The means of the epoch before are reset by now. A run that goes on
        # in the middle of one has them still.
        self._steps_before += self._steps
        self._steps = 0
        self._seen = {
            id(mean): _total_and_count(mean) for mean in self._means()
        }

    def on_train_batch_end(self, batch, logs=None):
        logs = logs or {}
        self._steps = batch + 1
        step = self._steps_before + self._steps
        self.losses[step] = self._loss(logs)
        if "loss_scale" in logs:
            scale = float(logs["loss_scale"])
            if not self.scale_changes or self.scale_changes[-1][1] != scale:
                self.scale_changes.append((step, scale))

    def _means(self):
        tracker = keras_internals.loss_tracker(self.model)
        others = [
            metric
            for metric in self.model.metrics
            if isinstance(metric, keras.metrics.Mean)
            and metric.name.endswith("loss")
            and metric is not tracker
        ]
        return [tracker, *others]

    def _loss(self, logs: Mapping[str, float]) -> float | None:
        for mean in self._means():
            total, count = _total_and_count(mean)
            total_before, count_before = self._seen.get(id(mean), (0.0, 0.0))
            self._seen[id(mean)] = total, count
            if count != count_before:
                return _finite((total - total_before) / (count - count_before))
            if count or _is_keras_step(self.model):
                return None
        for name, value in logs.items():
            if name.endswith("loss"):
                return _finite(float(value))
        return None


def _is_keras_step(model: keras.Model) -> bool:
    return type(model).train_step is keras.Model.train_step


def _total_and_count(mean: keras.metrics.Mean) -> tuple[float, float]:
    return float(mean.total.numpy()), float(mean.count.numpy())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
