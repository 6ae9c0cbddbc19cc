"""Saves a run so that it goes on exactly, and finds the newest whole save.

Exact means bit for bit: on the same number of replicas, with deterministic
ops, the weights end as those of a run that was never stopped. On another
number of replicas, metrics and moving statistics are right to rounding.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfamp.checkpoint import other_state, place
from tfamp.checkpoint.callback_state import CallbackStates
from tfamp.checkpoint.command import Command, Saved
from tfamp.checkpoint.folder import Folder
from tfamp.checkpoint.lease import Lease
from tfamp.checkpoint.random_state import set_random_state
from tfamp.checkpoint.replica_state import gather_number
from tfamp.checkpoint.run_state import RunState, read_metadata
from tfamp.errors import InputError, Preempted, SaveError
from tfamp.precision.policy import precision_of

# What TensorFlow and JSON raise about files that are cut short or changed.
_UNREADABLE = (tf.errors.OpError, ValueError, LookupError, RuntimeError)

_NOTHING, _FAILED = -1, -2


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        epoch: epochs that are over.
        step: steps done of the epoch after them.
        notes: what else the training loop must remember, of JSON's types.
    """

    epoch: int
    step: int = 0
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run, in one directory.

    The newest `keep` stay there, and in `best/` the best by a metric. Kept
    are the model's variables (weights, moving statistics, seeds), its
    metrics' (so that an epoch's means go on), and those of all optimizers
    that the model holds as attributes, with their loss scales.

    Every worker must make one and call its methods at the same steps, since
    replicas are asked for their own values; only the chief writes. All
    workers must see the directory: a shared file system.

    Args:
        model: compiled, its variables and its optimizers' all built.
        directory: made when it is first written; on any file system that
            `tf.io.gfile` knows.
        monitor: the name in the logs of what makes a checkpoint the best;
            None for "val_loss" where there is one, else "loss".
        mode: "min" or "max", whether the monitor should be low, as a loss, or
            high, as an accuracy; to be given with a monitor, and "min"
            without.
        keep: how many of the newest to keep.
        with_frozen: False leaves out the weights of layers whose `trainable`
            is False. The model must have them from elsewhere when it is
            restored: their fingerprints are compared.
        callbacks: whose state is saved too; None for none.

    Raises:
        InputError: for a directory that holds something else, or arguments
            that cannot be used.
    """

    def __init__(
        self,
        model: keras.Model,
        directory: str | bytes | os.PathLike,
        *,
        monitor: str | None = None,
        mode: str | None = None,
        keep: int = 3,
        with_frozen: bool = True,
        callbacks: CallbackStates | None = None,
    ):
        if mode not in (("min", "max") if monitor else (None, "min")):
            raise InputError(
                f"monitor={monitor!r} with mode={mode!r}; expected 'min' or "
                "'max' with a monitor of your own, and no mode without."
            )
        self._model = model
        self._strategy = model.distribute_strategy
        self._monitor, self._mode = monitor, mode or "min"
        self._state = RunState(model, with_frozen)
        is_chief = self._strategy.extended.should_checkpoint
        checkpoint = self._state.checkpoint
        directory = place.text_of(directory)
        with place.told_in_one_line(directory, begins=True):
            self._folder = Folder(directory, checkpoint, keep, is_chief)
            best = self._folder.path("best")
            if place.is_link(best):
                # Files are deleted in there.
                raise InputError(
                    f"{best} is a link; remove it, or use another directory."
                )
            self._best = Folder(best, checkpoint, 1, is_chief)
        self._lease: Lease | None = None
        self._best_value: float | None = None
        self._random_state: dict[str, Any] | None = None
        self._callbacks = callbacks
        self._restored: str | None = None
        self._command = Command(model, self._state.optimizers)

    def restore(self) -> Position | None:
        """Restores the newest checkpoint that is whole.

        One that cannot be read is reported, and the one before it used. The
        random numbers of the process stay for `restore_random_state`.

        Returns:
            Where that run stood; None where the directory has no checkpoint.

        Raises:
            InputError: where there are checkpoints but none can be read, or
                they are of another model. Where none can be read, the model's
                variables may hold some of their values.
        """
        position = self._restore(self._folder)
        if position is not None:
            self._best_value = self._read_best_value()
        return position

    def restore_best(self) -> Position | None:
        """As `restore`, of the best checkpoint."""
        return self._restore(self._best)

    def begin(self) -> None:
        """Takes note of the callbacks, and restores what was restored again.

        Call it after `on_train_begin`.
        """
        if self._callbacks is not None:
            self._callbacks.begin()
        self.restore_again()

    def restore_again(self) -> None:
        """Puts back what was restored, and the callbacks' state with it.

        Callbacks are told that training or an epoch begins, as they were in
        the run that is resumed, and may set weights or a learning rate then:
        what that run made of them counts. Does nothing where nothing was
        restored.

        Raises:
            InputError: where the checkpoint is not there any more.
        """
        if self._restored is None:
            return
        try:
            metadata = self._state.restore(self._restored)
        except _UNREADABLE:
            raise InputError(
                "A checkpoint was there and cannot be read any more in "
                f"{self._folder.directory}; start again once that is left "
                "alone."
            ) from None
        if "command" in metadata:
            self._command.set_rates(Saved(**metadata["command"]))
        # Checkpoints from before this key have none.
        if self._callbacks is not None and "callbacks" in metadata:
            self._callbacks.restore(metadata["callbacks"], metadata["arrays"])
        if "other" in metadata:
            other_state.restore(
                self._model, metadata["other"], metadata["arrays"]
            )
        self.restore_random_state()

    def restore_random_state(self) -> None:
        """Sets the random numbers of Python, NumPy and Keras as restored.

        Call it when the data are at their place: reading them may draw.
        """
        if self._random_state is not None:
            set_random_state(self._random_state)

    def open(self, is_ended: Callable[[], bool] = lambda: False) -> None:
        """Makes the directory, and keeps other jobs out of it until `close`.

        Args:
            is_ended: whether this process was told to end; asked while it
                waits for a job that may be dead.

        Raises:
            InputError: on all workers, where the chief cannot write there or
                another job does.
            SaveError: on the chief, where it may be able to later.
        """
        problem: BaseException | None = None
        if self._folder.is_chief:
            try:
                self._folder.check_writable()
                lease = Lease(self._folder.directory, is_ended)
                with place.told_in_one_line(self._folder.directory):
                    lease.take()
                self._lease = lease
            except (InputError, SaveError, Preempted) as error:
                problem = error
        is_problem = gather_number(self._strategy, int(problem is not None))
        if any(is_problem):
            raise problem or InputError(
                f"The chief cannot save in {self._folder.directory}."
            )

    def close(self) -> None:
        """Lets other jobs have the directory; safe to call at any time."""
        self._command.note_end()
        if self._lease is not None:
            self._lease.release()

    def save(
        self, position: Position, logs: dict[str, float] | None = None
    ) -> None:
        """Saves the run; a kill at any moment leaves the saves before.

        Args:
            position: where the run stands.
            logs: the epoch's, at its end: then it may be the best so far.

        Raises:
            InputError: where the logs lack the metric to monitor, the
                directory cannot be written, or another job took it over.
            SaveError: where the directory cannot be written now.
        """
        best = None if logs is None else self._monitored(logs)
        notes = {
            "position": dataclasses.asdict(position),
            "best": best,
            "command": self._command.notes(),
        }
        arrays: list[np.ndarray] = []
        if self._callbacks is not None:
            notes["callbacks"], arrays = self._callbacks.capture()
        notes["other"] = other_state.capture(self._model, arrays)
        # All workers take part in this, and then the chief writes.
        self._state.capture(notes, arrays)
        if not self._folder.is_chief:
            return
        if self._lease is not None:
            with place.told_in_one_line(self._folder.directory):
                self._lease.check()
        # First: a kill between the two repeats the epoch, and loses nothing.
        if best is not None and self._is_best(best["value"]):
            self._best.save()
            self._best_value = best["value"]
        self._folder.save()
        self._state.forget()

    def _restore(self, folder: Folder) -> Position | None:
        number, metadata, problem = self._restore_newest(folder)
        # A file system may show one worker what it does not show another.
        if len(set(gather_number(self._strategy, number))) > 1:
            problem = problem or InputError(
                f"The workers see different checkpoints in {folder.directory}; "
                "it must be on a file system that they share."
            )
        if problem is not None:
            raise problem
        if metadata is None:
            return None
        self._random_state = metadata["random_state"]
        self._restored = folder.prefix(number)
        # Checkpoints from before this key say nothing.
        if "command" in metadata:
            self._command.go_on(Saved(**metadata["command"]), folder.directory)
        before, now = metadata["precision"], precision_of(self._model)
        logging.info(
            "Restored %s%s.",
            folder.shown(folder.prefix(number)),
            "" if now == before else f", saved in {before}, into {now}",
        )
        return Position(**metadata["position"])

    def _restore_newest(
        self, folder: Folder
    ) -> tuple[int, dict[str, Any] | None, InputError | None]:
        """The number and its metadata, or what is wrong, if anything.

        The problem is returned: a worker that raised it at once would leave
        the others waiting.
        """
        numbers = folder.numbers()
        for number in reversed(numbers):
            prefix = folder.prefix(number)
            try:
                return number, self._state.restore(prefix), None
            except InputError as error:
                return _FAILED, None, InputError(folder.shown(str(error)))
            except _UNREADABLE as error:
                logging.warning(
                    "Checkpoint %s cannot be read and is passed over (%s).",
                    folder.shown(prefix),
                    folder.shown(_first_line(error)),
                )
        if numbers or folder.has_lost_files():
            problem = InputError(
                f"None of the checkpoints in {folder.directory} can be read; "
                "move them away to start anew."
            )
            return _FAILED, None, problem
        return _NOTHING, None, None

    def _monitored(self, logs: dict[str, float]) -> dict[str, Any]:
        name = self._monitor
        if name is None:
            name = "val_loss" if "val_loss" in logs else "loss"
        if name not in logs:
            raise InputError(
                f"No {name!r} to keep the best checkpoint by; the logs have "
                f"{', '.join(sorted(logs))}."
            )
        return {"monitor": name, "mode": self._mode, "value": float(logs[name])}

    def _is_best(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._best_value is None:
            return True
        sign = 1 if self._mode == "min" else -1
        return sign * value < sign * self._best_value

    def _read_best_value(self) -> float | None:
        """The best so far, unless it was the best by something else."""
        for number in reversed(self._best.numbers()):
            try:
                best = read_metadata(self._best.prefix(number))["best"]
            except _UNREADABLE:
                continue
            wanted = (self._monitor or best["monitor"], self._mode)
            if (best["monitor"], best["mode"]) == wanted:
                return best["value"]
        return None


def _first_line(error: Exception) -> str:
    """Of TensorFlow's message, without the names of operations."""
    text = re.sub(r"{{.*?}} *| *\[Op:\w+\].*", "", str(error))
    return text.partition("\n")[0]
