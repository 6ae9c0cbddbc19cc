"""Watching a recipe from outside: what every `fit` inside a context gets too.

`tfamp parity` and `tfamp bench` run a recipe's own `train`, which knows
nothing of them, and see its steps through this.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf


def _unchanged(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset


@dataclasses.dataclass(frozen=True)
class Observer:
    """What is added to each call of `tfamp.fit`.

    Attributes:
        callbacks: called after the caller's own.
        change_dataset: makes the training data out of those of the caller.
    """

    callbacks: Sequence[keras.callbacks.Callback] = ()
    change_dataset: Callable[[tf.data.Dataset], tf.data.Dataset] = _unchanged


_NOBODY = Observer()
_current: contextvars.ContextVar[Observer] = contextvars.ContextVar(
    "tfamp_observer", default=_NOBODY
)


def current() -> Observer:
    """The observer that `fit` has to serve; one that asks nothing, mostly."""
    return _current.get()


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Within it, each call of `tfamp.fit` in this thread has the observer."""
    token = _current.set(observer)
    try:
        yield
    finally:
        _current.reset(token)
