"""What a command asked for when its run began, and asks for now.

A job that is started again may have been changed. What its options say now
counts, and is said; what is learned goes on.
"""

import contextlib
import dataclasses
import hashlib
import uuid
import weakref
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from tfamp import keras_internals
from tfamp.scaling.optimizer import LossScaleOptimizer

# What an optimizer begins with; afterwards it is state.
_ONLY_AT_BEGIN = ("initial_scale", "name")
_RATE = "learning_rate"
# Enough of each variable to tell two random ones apart.
_ENTRIES = 256

# By optimizer: its options as fit left them, and as its command gave them.
_left: weakref.WeakKeyDictionary[Any, tuple[dict, dict]] = (
    weakref.WeakKeyDictionary()
)
# By model: the runs that trained it in this process.
_runs: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Saved:
    """Of a run's command, what its checkpoints hold.

    Attributes:
        run: tells this run from all others.
        weights: a fingerprint of the weights that it began with.
        options: of each optimizer, by name.
    """

    run: str
    weights: str
    options: list[dict[str, Any]]


class Command:
    """What this process was started with.

    Args:
        model: compiled and built, before anything is restored.
        optimizers: of the model.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizers: list[keras.optimizers.Optimizer],
    ):
        self._model = model
        self._optimizers = _leaves(optimizers)
        self._options = []
        for optimizer in self._optimizers:
            now = _options(optimizer)
            left, given = _left.get(optimizer, (None, now))
            # What callbacks made of it in an earlier fit is no new command.
            self._options.append(given if now == left else now)
        self._weights = _fingerprint(model)
        self._run = uuid.uuid4().hex

    def notes(self) -> dict[str, Any]:
        """What to save."""
        _runs.setdefault(self._model, set()).add(self._run)
        return dataclasses.asdict(
            Saved(self._run, self._weights, self._options)
        )

    def note_end(self) -> None:
        """Remembers, for a later fit of this process, how this one left."""
        for optimizer, given in zip(
            self._optimizers, self._options, strict=True
        ):
            _left[optimizer] = (_options(optimizer), given)

    def go_on(self, saved: Saved, directory: str) -> None:
        """Takes the run of a checkpoint up; says what is another now.

        Call it when the checkpoint was restored.
        """
        is_known = saved.run in _runs.get(self._model, ())
        if saved.weights != self._weights and not is_known:
            logging.warning(
                "The run in %s began with other weights than this one does: "
                "with another seed, or as another run. It is gone on with; "
                "another checkpoint_dir begins anew.",
                directory,
            )
        self._run, self._weights = saved.run, saved.weights
        changes = [
            change
            for before, now in zip(saved.options, self._options, strict=False)
            for change in _changes(before, now)
        ]
        self.set_rates(saved)
        if changes:
            logging.warning(
                "This command changes %s: from here on as it says now.",
                ", ".join(changes),
            )

    def set_rates(self, saved: Saved) -> None:
        """Sets a rate that is another number now, wherever it has come to."""
        for optimizer, before, now in zip(
            self._optimizers, saved.options, self._options, strict=False
        ):
            rate, former = now.get(_RATE), before.get(_RATE)
            is_number = isinstance(rate, float) and isinstance(former, float)
            if is_number and rate != former:
                optimizer.learning_rate = rate


def options_of(
    optimizer: keras.optimizers.Optimizer | None,
) -> dict[str, Any]:
    """Of an optimizer and those in it: numbers, and schedules as texts."""
    options: dict[str, Any] = {}
    for each in _leaves([optimizer] if optimizer is not None else []):
        for name, value in _options(each).items():
            options.setdefault(name, value)
    return options


def _leaves(
    optimizers: list[keras.optimizers.Optimizer],
) -> list[keras.optimizers.Optimizer]:
    """With those that others hold."""
    found = []
    for optimizer in optimizers:
        found.append(optimizer)
        if isinstance(optimizer, LossScaleOptimizer):
            found += _leaves([optimizer.inner_optimizer])
        else:
            inner = keras_internals.single_optimizers(optimizer)
            found += [each for each in inner if each is not optimizer]
    return found


def _options(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Numbers as they are, schedules as texts; JSON keeps both."""
    config: dict[str, Any] = {}
    with contextlib.suppress(NotImplementedError, TypeError, ValueError):
        config = optimizer.get_config()
    options = {
        key: value
        for key, value in config.items()
        if key not in _ONLY_AT_BEGIN
        and (value is None or isinstance(value, (bool, int, float, str)))
    }
    if isinstance(optimizer, LossScaleOptimizer):
        # Those of the optimizer in it are its own.
        options.pop(_RATE, None)
    elif isinstance(config.get(_RATE), dict):
        rate = config[_RATE]
        name = rate.get("class_name", "a schedule")
        inner = rate.get("config", {})
        numbers = [
            f"{key}={value}" for key, value in inner.items() if key != "name"
        ]
        options[_RATE] = f"{name}({', '.join(numbers)})"
    return options


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key} from {before[key]!r} to {value!r}"
        for key, value in now.items()
        if key in before and before[key] != value
    ]


def _fingerprint(model: keras.Model) -> str:
    """Of the first entries of each weight that trains."""
    digest = hashlib.blake2b(digest_size=16)
    for variable in model.trainable_variables:
        entries = tf.reshape(variable.value, [-1])[:_ENTRIES]
        digest.update(entries.numpy().tobytes())
    return digest.hexdigest()
