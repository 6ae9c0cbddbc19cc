"""What callbacks remember: patience, the best so far, its weights.

A callback of Keras, or one made from one, is asked for nothing: its attributes
that changed since training began are its state. One of the user's own has
`get_state()` and `set_state(state)`, or is named where it changes.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import logging

from tfamp.checkpoint.plain_values import NotPlain, decode, encode

# Given by fit, not by what the callback saw.
_GIVEN = ("_model", "model", "params", "_params", "validation_data")
# Whether a profiler runs in this process.
_PROFILER = ("_is_tracing", "_profiler_started", "_should_write_train_graph")
# Keras derives the two from the arguments at the first epoch's end, of which
# one is a function: either both are there or none.
_DERIVED = ("monitor_op", "min_delta")
# What a process did, and what goes on by itself.
_OF_THIS_PROCESS = (
    keras.callbacks.History,
    keras.callbacks.ProgbarLogger,
)
# Larger ones count as changed when they are another object.
_LOOKED_INTO_BYTES = 2**20


class CallbackStates:
    """The state of all callbacks of a run.

    Args:
        callbacks: as fit calls them; lists of them are looked into.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback]):
        self._callbacks = _named(callbacks)
        self._at_begin: dict[str, dict[str, _Mark]] = {}
        self._is_told: set[str] = set()

    def begin(self) -> None:
        """Call it after `on_train_begin`, before anything is restored."""
        self._at_begin = {
            name: _marks(callback) for name, callback in self._callbacks.items()
        }

    def capture(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The state as JSON, and its arrays; tells what it lacks."""
        arrays: list[np.ndarray] = []
        saved: dict[str, Any] = {}
        lacking: dict[str, list[str]] = {}
        for name, callback in self._callbacks.items():
            if _is_asked(callback):
                try:
                    saved[name] = encode(callback.get_state(), arrays)
                except NotPlain as error:
                    lacking[name] = [f"get_state(), which holds {error}"]
                continue
            changed = self._changed(name, callback)
            if _is_of_keras(callback):
                attributes = {}
                for key in changed:
                    try:
                        attributes[key] = encode(vars(callback)[key], arrays)
                    except (NotPlain, RecursionError):
                        # An open file, a function: made anew.
                        continue
                saved[name] = attributes
            elif changed:
                lacking[name] = changed
        self._tell(lacking)
        return {"saved": saved, "lacking": lacking}, arrays

    def restore(
        self, state: dict[str, Any], arrays: Sequence[np.ndarray]
    ) -> None:
        """Gives the callbacks what `capture` returned, where they are here."""
        for name, encoded in state["saved"].items():
            callback = self._callbacks.get(name)
            if callback is None:
                continue
            if _is_asked(callback):
                callback.set_state(decode(encoded, arrays))
            elif _is_of_keras(callback):
                for key, value in encoded.items():
                    setattr(callback, key, decode(value, arrays))
        self._tell(state["lacking"])

    def _changed(
        self, name: str, callback: keras.callbacks.Callback
    ) -> list[str]:
        before = self._at_begin.get(name, {})
        return [
            key
            for key, mark in _marks(callback).items()
            if key not in before or before[key] != mark
        ]

    def _tell(self, lacking: dict[str, list[str]]) -> None:
        for name, attributes in lacking.items():
            if name in self._callbacks and name not in self._is_told:
                self._is_told.add(name)
                logging.warning(
                    "Callback %s changes %s, which checkpoints lack: a run "
                    "that goes on begins with it anew. With get_state() and "
                    "set_state(state) it goes on too.",
                    name,
                    ", ".join(attributes[:3])
                    + (", ..." if len(attributes) > 3 else ""),
                )


class _Mark:
    """Tells whether an attribute is what it was; keeps what it compares."""

    def __init__(self, value: Any):
        arrays: list[np.ndarray] = []
        try:
            text = json.dumps(encode(value, arrays))
        except (NotPlain, RecursionError):
            self._key: tuple[object, ...] = ("object", id(value))
            self._kept: object = value
            return
        large = [each for each in arrays if each.nbytes > _LOOKED_INTO_BYTES]
        small = [each for each in arrays if each.nbytes <= _LOOKED_INTO_BYTES]
        digest = hashlib.blake2b(text.encode(), digest_size=16)
        for each in small:
            digest.update(f"{each.dtype}{each.shape}".encode())
            digest.update(each.tobytes())
        self._key = (
            "value",
            digest.hexdigest(),
            *map(id, _objects(value) if large else ()),
        )
        # An id means nothing when its object is gone.
        self._kept = value if large else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark) and self._key == other._key

    __hash__ = None  # type: ignore[assignment]


def _objects(value: Any) -> list[Any]:
    return [value, *value] if isinstance(value, (list, tuple)) else [value]


def _marks(callback: keras.callbacks.Callback) -> dict[str, _Mark]:
    return {
        key: _Mark(value)
        for key, value in vars(callback).items()
        if key not in (*_GIVEN, *_DERIVED, *_PROFILER)
    }


def _named(
    callbacks: Sequence[keras.callbacks.Callback],
) -> dict[str, keras.callbacks.Callback]:
    """By class, and by number among those of one class."""
    named: dict[str, keras.callbacks.Callback] = {}

    def add(each: Any) -> None:
        if isinstance(each, keras.callbacks.CallbackList):
            for inner in each.callbacks:
                add(inner)
            return
        # tfamp's own have their files.
        if (
            isinstance(each, _OF_THIS_PROCESS)
            or _package(type(each)) == "tfamp"
        ):
            return
        name = cls = type(each).__qualname__.rpartition(".")[2]
        number = 1
        while name in named:
            number += 1
            name = f"{cls}_{number}"
        named[name] = each

    for each in callbacks:
        add(each)
    return named


def _is_asked(callback: keras.callbacks.Callback) -> bool:
    return all(
        callable(getattr(callback, name, None))
        for name in ("get_state", "set_state")
    )


def _is_of_keras(callback: keras.callbacks.Callback) -> bool:
    """Whether Keras wrote what it does, at least some of it."""
    return any(
        _package(cls) == "keras" and cls is not keras.callbacks.Callback
        for cls in type(callback).__mro__
        if cls is not object
    )


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
