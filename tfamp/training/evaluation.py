"""One traced function that evaluates a model again and again."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.distribute.strategy import distribute_batches
from tfamp.errors import INPUT_ERROR_MARK, InputError
from tfamp.precision.policy import precision_of
from tfamp.step import build
from tfamp.step.logs import flattened
from tfamp.step.trial import plan_of
from tfamp.training import preconditions, programs
from tfamp.training.data import Batches
from tfamp.training.loop import Loop
from tfamp.training.warning import warn

_INPUT_PROBLEM = re.compile(
    rf"{INPUT_ERROR_MARK}.*|Received a label value of .*?\)"
    r"|Cast string to \w+ is not supported"
    r"|indices\[[\d,]*\] = -?\d+ is not in \[.*?\)"
)


class _Evaluation(NamedTuple):
    """What evaluates a model.

    returned: by a `test_step` of the model's own; nothing else was evaluated.
    """

    loop: Loop
    returned: set[str]


class Evaluator:
    """Evaluates a model again and again with one traced function."""

    # Few enough that a graph call ends soon, many enough to hide Python.
    _STEPS_PER_LOOP = 64

    def __init__(
        self,
        model: keras.Model,
        batches: Batches,
        callbacks: keras.callbacks.CallbackList | None = None,
        watched: bool = False,
    ):
        dataset = batches.dataset
        if batches.steps is None and preconditions.is_endless(dataset):
            raise InputError(
                "The dataset to evaluate on repeats without end; use "
                "dataset.take(n)."
            )
        strategy = model.distribute_strategy
        self._model = model
        self._data = batches
        self._limit = batches.steps or batches.count
        self._callbacks = callbacks or keras.callbacks.CallbackList()
        # Callbacks that watch batches see each.
        self._watched = watched
        self._batches = distribute_batches(strategy, dataset)
        # Of a model whose loops no other call may use.
        self._made: _Evaluation | None = None

    def run(self, callbacks: bool = True) -> dict[str, float]:
        """Evaluates once; the batches of the next time are the same.

        Args:
            callbacks: whether to tell them.
        """
        if not callbacks:
            others = self._callbacks, self._watched
            self._callbacks = keras.callbacks.CallbackList()
            self._watched = False
            try:
                return self.run()
            finally:
                self._callbacks, self._watched = others
        with self._evaluation() as evaluation:
            return self._run(evaluation)

    def _run(self, evaluation: _Evaluation) -> dict[str, float]:
        loop = evaluation.loop
        loop.begin()
        model, limit = self._model, self._limit
        model.stop_evaluating = False
        self._callbacks.on_test_begin()
        model.reset_metrics()
        self._data.begin_epoch()
        iterator = iter(self._batches)
        has_more = True
        while has_more and not model.stop_evaluating:
            wanted = self._STEPS_PER_LOOP
            if self._watched:
                wanted = model.steps_per_execution
            if limit is not None:
                wanted = min(wanted, limit - loop.steps)
            if not wanted:
                break
            has_more = self._graph_call(evaluation, iterator, wanted)
        self._data.end_epoch()
        done = loop.steps
        if not done:
            raise InputError("The dataset ended before the first batch.")
        if done < (self._data.steps or 0) and not model.stop_evaluating:
            warn(
                f"The data to evaluate on ended after {done} of "
                f"{self._data.steps} steps."
            )
        logs = self._results(evaluation)
        self._callbacks.on_test_end(logs)
        return logs

    def _graph_call(
        self, evaluation: _Evaluation, iterator: Iterator, wanted: int
    ) -> bool:
        """Runs some steps; False where the data ended."""
        loop = evaluation.loop
        before = loop.steps
        if self._watched:
            self._callbacks.on_test_batch_begin(before)
        with graph_calls(self._model):
            has_more = loop.run(iterator, wanted)
        if self._watched and loop.steps > before:
            last = keras_internals.last_of_execution(
                self._model, before, loop.steps
            )
            logs = self._results(evaluation)
            self._callbacks.on_test_batch_end(last, logs)
        return has_more

    def _results(self, evaluation: _Evaluation) -> dict[str, float]:
        results = metrics_now(self._model, keras.Model.test_step)
        if returned := evaluation.returned:
            logs = evaluation.loop.logs | results
            results = {n: v for n, v in logs.items() if n in returned}
        return results

    def _evaluation(self) -> contextlib.AbstractContextManager[_Evaluation]:
        """What evaluates; to be made when the model and all of it is built."""
        model = self._model
        if programs.can_keep(model):
            spec = self._data.dataset.element_spec
            options = ("evaluate", spec, model.run_eagerly)
            return programs.lent(model, options, self._make)
        self._made = self._made or self._make(lambda: None)
        return contextlib.nullcontext(self._made)

    def _make(self, on_trace: Callable[[], None]) -> _Evaluation:
        model = self._model
        returned: set[str] = set()
        strategy = model.distribute_strategy
        if type(model).test_step is keras.Model.test_step:
            replicas = strategy.num_replicas_in_sync
            spec = self._data.dataset.element_spec
            plan = plan_of(
                model, spec, self._data.first, replicas, training=False
            )
            step = build.evaluation_step(model, strategy, plan)
        else:
            step = build.custom_evaluation_step(model, strategy, returned)
        loop = Loop(
            step,
            strategy,
            model.run_eagerly,
            is_narrow=precision_of(model) != "float32",
            on_trace=on_trace,
        )
        return _Evaluation(loop, returned)


def metrics_now(model: keras.Model, step: Callable) -> dict[str, float]:
    """The metrics as they stand, over all replicas; waits for the device."""
    logs = {
        name: _python_number(value)
        for name, value in flattened(model.get_metrics_result()).items()
    }
    tracker = keras_internals.loss_tracker(model)
    if tracker in model.metrics and not float(tracker.count.numpy()):
        if getattr(type(model), step.__name__) is step:
            # No batch had a finite loss; 0 would look like success.
            logs["loss"] = float("nan")
            if type(model).compute_metrics is keras.Model.compute_metrics:
                logs = {
                    name: np.full_like(value, np.nan, dtype=float)[()]
                    for name, value in logs.items()
                }
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
    except (
        tf.errors.InvalidArgumentError,
        tf.errors.UnimplementedError,
    ) as error:
        for line in str(error).splitlines():
            if found := _INPUT_PROBLEM.search(line):
                text = found.group().removeprefix(INPUT_ERROR_MARK)
                raise InputError(text.strip()) from None
        if "/Ragged" in str(error):
            raise InputError(
                "The model cannot compute with these ragged batches; pad "
                "them: dataset.map(lambda x, y: (x.to_tensor(), y))."
            ) from None
        raise
