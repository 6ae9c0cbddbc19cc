"""The epochs of one call of fit: calls of the graph, reports, saves."""

import dataclasses
import math
import time
from collections.abc import Collection, Iterable, Iterator

import keras
import tensorflow as tf
from absl import logging

from tfamp import keras_internals
from tfamp.checkpoint import other_state, preemption
from tfamp.checkpoint.data_position import advance
from tfamp.checkpoint.first_batches import FirstBatches
from tfamp.checkpoint.store import Checkpoints, Position
from tfamp.distribute import vigil
from tfamp.distribute.agreement import check_alike
from tfamp.distribute.consensus import Consensus, number_of_workers
from tfamp.distribute.strategy import devices_of, distribute_batches
from tfamp.errors import InputError, Preempted
from tfamp.overflow import watch as overflow
from tfamp.step import build
from tfamp.training import alike, hooks
from tfamp.training.data import Batches
from tfamp.training.evaluation import Evaluator, graph_calls, metrics_now
from tfamp.training.loop import Loop
from tfamp.training.pace import Clock, Pace
from tfamp.training.warning import warn

# What a killed run loses at most, where an epoch takes longer.
SECONDS_BETWEEN_SAVES = 300


class Run:
    """The epochs of one call of fit.

    Attributes:
        callbacks: those that are told of it.
        leaves_averages: whether the weights that it leaves are averages, and
            not those of its last epoch.
    """

    def __init__(
        self,
        model: keras.Model,
        data: Batches,
        loop: Loop,
        *,
        evaluator: Evaluator | None,
        validation_freq: int | Collection[int],
        watch: overflow.OverflowWatch,
        checkpoints: Checkpoints | None,
        steps_per_loop: int | str,
        watched: bool,
        callbacks: keras.callbacks.CallbackList,
    ):
        strategy = model.distribute_strategy
        self.callbacks = callbacks
        self.leaves_averages = False
        self._model = model
        self._data = data
        self._loop = loop
        self._has_warned_of_draws = False
        self._batches: Iterable | None = None
        self._several_workers = number_of_workers(strategy) > 1
        self._first_batches = (
            FirstBatches()
            if (self._several_workers or checkpoints is not None)
            # Hosts of a pod run no Python of this process.
            and not isinstance(strategy, tf.distribute.TPUStrategy)
            else None
        )
        self._iterator: Iterator | None = None
        # Of the iterator.
        self._steps_seen = 0
        self._initial_epoch = 0
        self._watch = watch
        self._sees_steps = loop.kept is not None
        self._steps_before = 0
        self._watched = watched
        self._consensus = Consensus(strategy)
        self._pace = Pace(
            1 if watched and steps_per_loop == "auto" else steps_per_loop,
            agree=lambda seconds: self._consensus.mean(seconds)[0],
        )
        self._clock = Clock(self._loop)
        self._checkpoints = checkpoints
        self._preemption = preemption.current()
        self._last_save = time.monotonic()
        self._epochs_done = 0
        self._average_statistics = build.average_statistics(model, strategy)
        self._evaluator = evaluator
        self._validation_freq = validation_freq

    def epochs(
        self, epochs: int, initial_epoch: int = 0
    ) -> keras.callbacks.History:
        """Trains up to that epoch, from where the run stands."""
        try:
            return self._epochs(epochs, initial_epoch)
        finally:
            if self._checkpoints is not None:
                self._checkpoints.close()

    def _epochs(
        self, epochs: int, initial_epoch: int
    ) -> keras.callbacks.History:
        model = self._model
        self._initial_epoch = initial_epoch
        begin = self._restore(epochs)
        self._check_ended()
        self._steps_before = begin.notes.get("steps", 0)
        is_resumed = begin.epoch > 0 or begin.step > 0
        if is_resumed:
            hooks.keep_files(self.callbacks)
        self.callbacks.on_train_begin()
        first = keras_internals.initial_epoch(model) or initial_epoch
        if is_resumed:
            # What `BackupAndRestore` found is older, or of another run.
            keras_internals.forget_initial_epoch(model)
            first = max(begin.epoch, initial_epoch)
        if self._checkpoints is not None:
            self._checkpoints.begin()
        self._watch.begin(begin.epoch, self._steps_before, is_resumed)
        logs: dict[str, float] = {}
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
            self.leaves_averages = keras_internals.leaves_averages(
                model.optimizer
            )
        with vigil.alone():
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
        self._checkpoints.open(lambda: self._preemption.is_requested)
        position = self._checkpoints.restore()
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
        self._data.begin_anew()
        self._iterator = advance(
            self._distributed(),
            self._data.dataset,
            epochs=passes,
            steps=steps,
            is_ended=lambda: self._preemption.is_requested,
        )
        self._steps_seen = steps
        saved = position.notes.get("first_batches")
        if saved is not None and self._first_batches is not None:
            self._first_batches.compare(saved, passes=passes, steps=steps)

    def _distributed(self) -> Iterable:
        """The batches, shared by replicas; made when they are first wanted."""
        if self._batches is None:
            dataset = self._data.dataset
            if self._first_batches is not None:
                dataset = self._first_batches.watched(dataset)
            strategy = self._model.distribute_strategy
            self._batches = distribute_batches(strategy, dataset)
            self._data.note_use()
        return self._batches

    def _check_ended(self) -> None:
        """Ends on SIGTERM before anything is trained, on all workers alike."""
        if self._checkpoints is not None and self._consensus.any(
            self._preemption.is_requested
        ):
            raise Preempted(
                "SIGTERM: nothing was trained yet; start the same command "
                "again to go on."
            )

    def _epoch(self, begin: Position) -> dict[str, float]:
        """Trains and evaluates for one epoch; returns its logs, if any.

        Its first steps may have been done before this process.
        """
        epoch = begin.epoch
        if not begin.step:
            self._model.reset_metrics()
        self.callbacks.on_epoch_begin(epoch)
        self._data.begin_epoch()
        if begin.step and self._checkpoints is not None:
            # They were told so before, and what came of it was restored.
            self._checkpoints.restore_again()
        if self._iterator is None:
            self._iterator = iter(self._distributed())
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
            is_first = self._clock.steps == begin.step
            has_more = self._graph_call(epoch, wanted)
            if is_first and has_more and self._several_workers:
                self._check_alike()
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

    def _check_alike(self) -> None:
        """Ends all workers where one trains on something else."""
        batches = self._first_batches
        first = batches.notes()["pass"] if batches is not None else None
        strategy = self._model.distribute_strategy
        check_alike(strategy, alike.facts_of_epoch(self._model, first))

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
        self._warn_of_draws()
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
            last = keras_internals.last_of_execution(
                self._model, before, self._clock.steps
            )
            self.callbacks.on_train_batch_end(last, logs)
            if has_more:
                self._agree_and_save(Position(epoch, self._clock.steps))
        return has_more

    def _warn_of_draws(self) -> None:
        """Once, of the step that was traced."""
        graph = self._loop.graph
        if graph is None or self._checkpoints is None:
            return
        if not self._has_warned_of_draws:
            self._has_warned_of_draws = True
            other_state.warn_of_draws(graph, self._model)

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
                "first_batches": self._first_batches
                and self._first_batches.notes(),
            }
            position = dataclasses.replace(position, notes=notes)
            self._checkpoints.save(position, logs)
            self._last_save = time.monotonic()
        if ends:
            raise Preempted(
                f"SIGTERM: saved after epoch {position.epoch}, step "
                f"{position.step}; start the same command again to go on."
            )

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
        if is_whole or data.restarts or not has_more:
            self._iterator = None
        wanted = data.steps or data.count
        is_short = wanted is not None and done < wanted
        if not is_stopped and (is_short or done == 0):
            of_wanted = "" if wanted is None else f" of {wanted}"
            warn(
                f"The dataset ended after {done}{of_wanted} steps of this "
                "epoch. "
                "Use dataset.repeat(), or a smaller steps_per_epoch."
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
