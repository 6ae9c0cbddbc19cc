"""One traced function that evaluates a model again and again."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.distribute.strategy import distribute_batches
from tfamp.errors import INPUT_ERROR_MARK, InputError
from tfamp.step import build
from tfamp.step.trial import plan_of
from tfamp.training import preconditions
from tfamp.training.loop import Loop

_INPUT_PROBLEM = re.compile(
    rf"{INPUT_ERROR_MARK}.*|Received a label value of .*?\)"
)


class Evaluator:
    """Evaluates a model again and again with one traced function."""

    # Few enough that a graph call ends soon, many enough to hide Python.
    _STEPS_PER_LOOP = 64

    def __init__(
        self,
        model: keras.Model,
        dataset: tf.data.Dataset,
        limit: int | None = None,
    ):
        preconditions.check_is_dataset(dataset)
        if limit is None and preconditions.is_endless(dataset):
            raise InputError(
                "The dataset to evaluate on repeats without end; use "
                "dataset.take(n)."
            )
        self._limit = limit
        strategy = model.distribute_strategy
        self._model = model
        self._batches = distribute_batches(strategy, dataset)
        self._dataset = dataset
        # Made when the model, its loss and metrics are built.
        self._loop: Loop | None = None

    def run(self) -> dict[str, float]:
        if self._loop is None:
            self._loop = self._make_loop()
        self._model.reset_metrics()
        limit = self._limit
        iterator = iter(self._batches)
        begin = self._loop.steps
        wanted = self._STEPS_PER_LOOP
        with graph_calls(self._model):
            while limit is None or self._loop.steps - begin < limit:
                if limit is not None:
                    wanted = min(wanted, limit - self._loop.steps + begin)
                if not self._loop.run(iterator, wanted):
                    break
        if self._loop.steps == begin:
            raise InputError("The dataset ended before the first batch.")
        return metrics_now(self._model, keras.Model.test_step)

    def _make_loop(self) -> Loop:
        model = self._model
        strategy = model.distribute_strategy
        plan = None
        if type(model).test_step is keras.Model.test_step:
            replicas = strategy.num_replicas_in_sync
            plan = plan_of(model, self._dataset, replicas, training=False)
        step = build.evaluation_step(model, strategy, plan)
        return Loop(step, strategy, model.run_eagerly)


def metrics_now(model: keras.Model, step: Callable) -> dict[str, float]:
    """The metrics as they stand, over all replicas; waits for the device."""
    logs = {
        name: _python_number(value)
        for name, value in model.get_metrics_result().items()
    }
    tracker = keras_internals.loss_tracker(model)
    if tracker in model.metrics and not float(tracker.count.numpy()):
        if getattr(type(model), step.__name__) is step:
            # No batch had a finite loss; 0 would look like success.
            logs["loss"] = float("nan")
        else:
            # A step of the model's own, that counts no loss there.
            del logs["loss"]
    return logs


def _python_number(value: Any) -> Any:
    array = keras.ops.convert_to_numpy(value)
    return float(array) if array.ndim == 0 else array


@contextlib.contextmanager
def graph_calls(model: keras.Model) -> Iterator[None]:
    """Turns TensorFlow's errors about the user's data into one line."""
    try:
        with keras_internals.additional_losses_in_float32(model):
            yield
    except tf.errors.InvalidArgumentError as error:
        for line in str(error).splitlines():
            if found := _INPUT_PROBLEM.search(line):
                text = found.group().removeprefix(INPUT_ERROR_MARK)
                raise InputError(text.strip()) from None
        raise
