"""The epochs of one call of fit: calls of the graph, reports, saves."""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Collection, Iterator

import keras
import tensorflow as tf
from absl import logging

from tfamp import keras_internals
from tfamp.checkpoint.data_position import advance
from tfamp.checkpoint.preemption import Preemption
from tfamp.checkpoint.store import Checkpoints, Position
from tfamp.distribute.consensus import Consensus
from tfamp.distribute.strategy import devices_of, distribute_batches
from tfamp.errors import InputError, Preempted
from tfamp.overflow import watch as overflow
from tfamp.overflow.kept_step import KeptStep
from tfamp.precision.policy import precision_of
from tfamp.step import build
from tfamp.training.data import Batches
from tfamp.training.evaluation import Evaluator, graph_calls, metrics_now
from tfamp.training.loop import Loop
from tfamp.training.pace import Clock, Pace

# What a killed run loses at most, where an epoch takes longer.
SECONDS_BETWEEN_SAVES = 300


class Run:
    """The epochs of one call of fit."""

    def __init__(
        self,
        model: keras.Model,
        data: Batches,
        step: build.Step,
        *,
        evaluator: Evaluator | None,
        validation_freq: int | Collection[int],
        watch: overflow.OverflowWatch,
        kept: KeptStep | None,
        checkpoints: Checkpoints | None,
        steps_per_loop: int | str,
        watched: bool,
        callbacks: keras.callbacks.CallbackList,
    ):
        strategy = model.distribute_strategy
        self.callbacks = callbacks
        self._model = model
        self._data = data
        self._loop = Loop(
            step,
            strategy,
            model.run_eagerly,
            kept,
            is_narrow=precision_of(model) != "float32",
        )
        self._batches = distribute_batches(strategy, data.dataset)
        self._iterator: Iterator | None = None
        # Of the iterator.
        self._steps_seen = 0
        self._initial_epoch = 0
        self._watch = watch
        self._sees_steps = kept is not None
        self._steps_before = 0
        self._watched = watched
        self._consensus = Consensus(strategy)
        self._pace = Pace(
            1 if watched and steps_per_loop == "auto" else steps_per_loop,
            agree=lambda seconds: self._consensus.mean(seconds)[0],
        )
        self._clock = Clock(self._loop)
        self._checkpoints = checkpoints
        self._preemption = Preemption()
        self._last_save = time.monotonic()
        self._epochs_done = 0
        self._average_statistics = build.average_statistics(model, strategy)
        self._evaluator = evaluator
        self._validation_freq = validation_freq

    def epochs(
        self, epochs: int, initial_epoch: int = 0
    ) -> keras.callbacks.History:
        """Trains up to that epoch, from where the run stands."""
        model = self._model
        self._initial_epoch = initial_epoch
        begin = self._restore(epochs)
        self._steps_before = begin.notes.get("steps", 0)
        self.callbacks.on_train_begin()
        is_resumed = begin.epoch > 0 or begin.step > 0
        self._watch.begin(begin.epoch, self._steps_before, is_resumed)
        logs: dict[str, float] = {}
        first = keras_internals.initial_epoch(model) or initial_epoch
        first = max(begin.epoch, first)
        with self._preemption_watched():
            for epoch in range(first, epochs):
                if model.stop_training:
                    break
                is_begun = epoch == begin.epoch and begin.step > 0
                where = begin if is_begun else Position(epoch)
                logs = self._epoch(where) or logs
        if (
            epochs > 0
            and model.optimizer is not None
            and not begin.notes.get("is_final")
        ):
            # Weights that are averaged are the averages from here on.
            model.optimizer.finalize_variable_values(model.trainable_variables)
        self.callbacks.on_train_end(logs)
        if logs and model.stop_training and self._checkpoints is not None:
            # EarlyStopping has put the best weights back by now, and a run
            # that is stopped does not go on from others.
            notes = {"is_stopped": True, "is_final": True}
            self._checkpoints.save(Position(self._epochs_done, notes=notes))
        return model.history

    def _restore(self, epochs: int) -> Position:
        if self._checkpoints is None:
            return Position(0)
        position = self._checkpoints.restore()
        self._checkpoints.check_writable()
        if position is None:
            return Position(0)
        if position.notes.get("is_stopped"):
            logging.warning(
                "The run was stopped after epoch %d, and stays so; choose "
                "another checkpoint_dir to train on.",
                position.epoch,
            )
            self._model.stop_training = True
        elif position.epoch < epochs:
            self._go_to(position)
        self._checkpoints.restore_random_state()
        return position

    def _go_to(self, position: Position) -> None:
        """Finds the place in the data."""
        epochs = max(position.epoch - self._initial_epoch, 0)
        passes, steps = self._data.place(epochs, position.step)
        self._iterator = advance(
            self._batches, self._data.dataset, epochs=passes, steps=steps
        )
        self._steps_seen = steps

    def _epoch(self, begin: Position) -> dict[str, float]:
        """Trains and evaluates for one epoch; returns its logs, if any.

        Its first steps may have been done before this process.
        """
        epoch = begin.epoch
        if not begin.step:
            self._model.reset_metrics()
        self.callbacks.on_epoch_begin(epoch)
        self._data.begin_epoch()
        if self._iterator is None:
            self._iterator = iter(self._batches)
            self._steps_seen = 0
        self._watch.begin_epoch(begin.notes.get("skipped_at_epoch_begin"))
        self._clock.begin_epoch(begin.step)
        num_steps = self._steps_of_epoch(begin.step)
        has_more = True
        while has_more and not self._model.stop_training:
            wanted = self._pace.steps
            if num_steps is not None:
                wanted = min(wanted, num_steps - self._clock.steps)
            if wanted == 0:
                break
            has_more = self._graph_call(epoch, wanted)
        self._end_pass(begin.step, has_more)
        if self._clock.steps == 0:
            return {}
        logs = self._logs(epoch) | self._clock.logs()
        logs |= _memory_logs(self._model.distribute_strategy)
        self._average_statistics()
        if self._evaluator is not None and self._evaluates_after(epoch):
            results = self._evaluator.run()
            logs |= {f"val_{name}": value for name, value in results.items()}
        self.callbacks.on_epoch_end(epoch, logs)
        self._epochs_done = epoch + 1
        self._agree_and_save(Position(epoch + 1), logs)
        return logs

    def _graph_call(self, epoch: int, wanted: int) -> bool:
        """Runs some steps; False where the data ended."""
        before = self._clock.steps
        if self._watched:
            self.callbacks.on_train_batch_begin(before)
        has_more = True
        while has_more and self._clock.steps < before + wanted:
            with graph_calls(self._model):
                has_more = self._loop.run(
                    self._iterator, before + wanted - self._clock.steps
                )
            if self._loop.has_event:
                self._look(epoch)
        done = self._clock.steps - before
        if done and (self._watched or self._pace.is_due()):
            # Reading the metrics waits for the device; hence not each time.
            logs = self._logs(epoch)
            if math.isnan(self._loop.logs.get(build.NAN_LOG, 0.0)):
                # The mean leaves it out.
                logs["loss"] = float("nan")
            self._pace.measure(done)
            self._clock.end_warm_up()
            logs["examples_per_second"] = self._clock.examples_per_second
            self.callbacks.on_train_batch_end(self._clock.steps - 1, logs)
            if has_more:
                self._agree_and_save(Position(epoch, self._clock.steps))
        return has_more

    def _look(self, epoch: int) -> None:
        """A step was skipped, or moved a scale; a replay may take a while."""
        begin = time.perf_counter()
        where = f"epoch {epoch + 1}, step {self._clock.steps}"
        self._watch.look(where, epoch, self._steps)
        seconds = time.perf_counter() - begin
        self._pace.exclude(seconds)
        self._clock.exclude(seconds)

    @property
    def _steps(self) -> int:
        """Steps of the run, those before it was resumed too."""
        return self._steps_before + self._loop.steps

    def _logs(self, epoch: int) -> dict[str, float]:
        if not self._sees_steps:
            self._look(epoch)
        self._watch.check(f"epoch {epoch + 1}, step {self._clock.steps}")
        metrics = metrics_now(self._model, keras.Model.train_step)
        logs = self._loop.logs | metrics | self._watch.logs()
        logs.pop(build.NAN_LOG, None)
        return logs

    def _agree_and_save(
        self, position: Position, logs: dict[str, float] | None = None
    ) -> None:
        """Lets all workers stop, save and end alike.

        Saves at an epoch's end, which has logs, and within it when the last
        save was long ago or the process must end.
        """
        model = self._model
        stops, ends, seconds = self._consensus.mean(
            model.stop_training,
            self._preemption.is_requested,
            time.monotonic() - self._last_save,
        )
        model.stop_training = stops > 0
        if self._checkpoints is None:
            return
        if logs is not None or ends or seconds > SECONDS_BETWEEN_SAVES:
            notes = {
                "is_stopped": logs is not None and model.stop_training,
                "skipped_at_epoch_begin": self._watch.skipped_at_epoch_begin,
                "steps": self._steps,
            }
            position = dataclasses.replace(position, notes=notes)
            self._checkpoints.save(position, logs)
            self._last_save = time.monotonic()
        if ends:
            raise Preempted(
                f"SIGTERM: saved after epoch {position.epoch}, step "
                f"{position.step}; start the same command again to go on."
            )

    def _preemption_watched(self) -> contextlib.AbstractContextManager:
        if self._checkpoints is None:
            # Nothing could be saved: SIGTERM stays what it is.
            return contextlib.nullcontext()
        return self._preemption.watched()

    def _steps_of_epoch(self, done: int) -> int | None:
        """Steps of this epoch, where the data tell how many they have."""
        wanted, count = self._data.steps, self._data.count
        if wanted is None or count is None:
            return wanted or count
        return min(wanted, count - self._steps_seen + done)

    def _evaluates_after(self, epoch: int) -> bool:
        if isinstance(self._validation_freq, int):
            return (epoch + 1) % self._validation_freq == 0
        return epoch + 1 in self._validation_freq

    def _end_pass(self, done_before: int, has_more: bool) -> None:
        """Ends an epoch of the data, and a pass through them if it was one."""
        done = self._clock.steps
        data = self._data
        self._steps_seen += done - done_before
        data.end_epoch()
        is_stopped = self._model.stop_training
        if self._loop.steps == done == 0 and not is_stopped:
            raise InputError("The dataset ended before the first batch.")
        is_whole = data.steps is None or self._steps_seen == data.count
        if is_whole or not has_more:
            self._iterator = None
        wanted = data.steps or data.count
        is_short = wanted is not None and done < wanted
        if not is_stopped and (is_short or done == 0):
            of_wanted = "" if wanted is None else f" of {wanted}"
            warnings.warn(
                f"The dataset ended after {done}{of_wanted} steps of this "
                "epoch. "
                "Use dataset.repeat(), or a smaller steps_per_epoch.",
                stacklevel=5,
            )
            # Keras goes on, through epochs without a step.
            self._model.stop_training = done == 0
        if data.is_once and data.count is None and data.steps is None:
            # What is left of a generator for later epochs is not all.
            data.count = done
        elif wanted is None:
            self.callbacks.set_params(self.callbacks.params | {"steps": done})


def _memory_logs(strategy: tf.distribute.Strategy) -> dict[str, float]:
    """The peak over devices, since the process began, in bytes."""
    gpus = [
        tf.DeviceSpec.from_string(device)
        for device in devices_of(strategy)
        if "GPU" in device
    ]
    peaks = [
        tf.config.experimental.get_memory_info(f"GPU:{gpu.device_index}")[
            "peak"
        ]
        for gpu in gpus
    ]
    return {"peak_memory_bytes": max(peaks)} if peaks else {}
