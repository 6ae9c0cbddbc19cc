"""What was traced for a model, kept for the next call of `fit` and the like.

Tracing is most of the wait before a first step, and people call `fit` in a
loop, and `evaluate` after it. Keras keeps its functions until `compile`. Here
one serves as long as all that it may have read is what it was: layers, their
dtypes and attributes, the optimizer, losses and metrics.
"""

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.distribute.consensus import number_of_workers

# Training, evaluation on two sets, predictions, each with room for another.
_MOST = 8
# Larger arrays, and collections as of a tokenizer, are taken for what they were
# while they are the same object.
_MOST_BYTES = 65536
_MOST_ENTRIES = 1024
_PLACE = "_tfamp_programs"


@dataclasses.dataclass(eq=False)
class _Program:
    """Something that was made for a model, and what it was made of.

    is_mixed: whether its traces saw different facts.
    """

    options: Any
    made: Any = None
    facts: Any = None
    is_lent: bool = False
    is_mixed: bool = False


@contextlib.contextmanager
def lent(
    model: keras.Model, options: Any, make: Callable[[Callable[[], None]], Any]
) -> Iterator[Any]:
    """Within it, what is made for a model, or was made before of the same.

    Args:
        model: built.
        options: what else the trace depends on; compared with `==`.
        make: makes it; gets a function that is to be called after each call
            that traced, with the model as the trace saw it.
    """
    if not can_keep(model):
        yield make(lambda: None)
        return
    now = facts(model)
    # What is lent was traced by a call that this one is within.
    kept = [
        each
        for each in vars(model).get(_PLACE, [])
        if each.is_lent or each.facts == now
    ]
    program = next(
        (e for e in kept if not e.is_lent and e.options == options), None
    )
    if program is None:
        program = _Program(options)

        def note() -> None:
            now = facts(model)
            program.is_mixed |= program.facts not in (None, now)
            program.facts = now

        program.made = make(note)
    else:
        kept.remove(program)
    # Keras would track an attribute that is set.
    vars(model)[_PLACE] = [*kept, program][-_MOST:]
    program.is_lent = True
    try:
        yield program.made
    finally:
        program.is_lent = False
        # Eager, or it failed.
        has_no_trace = program.facts is None
        if has_no_trace or program.is_mixed:
            programs = vars(model)[_PLACE]
            vars(model)[_PLACE] = [e for e in programs if e is not program]


def can_keep(model: keras.Model) -> bool:
    """Whether a trace of this call may serve in another.

    Workers must trace alike, and see each its own model only. Weights in
    shards are kept in other variables by each call of `fit`.
    """
    is_alone = number_of_workers(model.distribute_strategy) == 1
    shards = getattr(getattr(model, "optimizer", None), "shards", None)
    return is_alone and shards is None


class _Same:
    """Equal to another of the same object, which it keeps alive."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def facts(model: keras.Model) -> Any:
    """All that a trace may have read of a model, to be compared with `==`.

    Numbers and strings count by value, at any depth of lists, dictionaries and
    objects; what variables hold, functions, large arrays and large collections
    by identity. What `keras.config` says counts too, and the global seed.
    """
    seen: set[int] = set()
    try:
        of_layers = [
            _facts(each, seen) for each in keras_internals.all_layers(model)
        ]
    except RecursionError:
        # Someone's chain of objects: equal to nothing.
        return object()
    return (
        _Same(model.distribute_strategy),
        # A new one has another state, as after `set_random_seed`.
        _Same(keras_internals.global_seed_generator(create=False)),
        keras.config.floatx(),
        keras.config.epsilon(),
        keras.config.dtype_policy().name,
        of_layers,
    )


def _facts(value: Any, seen: set[int]) -> Any:
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return type(value), repr(value)
    if isinstance(value, tf.Tensor) and not hasattr(value, "numpy"):
        # Left by a trace, which would be kept alive.
        return tf.Tensor
    if isinstance(value, np.ndarray) and value.nbytes <= _MOST_BYTES:
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, types.MethodType):
        return _Same(value.__self__), _Same(value.__func__)
    is_collection = isinstance(value, Mapping | list | tuple | set | frozenset)
    if id(value) in seen or (is_collection and len(value) > _MOST_ENTRIES):
        return _Same(value)
    if isinstance(value, Mapping):
        seen.add(id(value))
        return [
            (_facts(key, seen), _facts(each, seen))
            for key, each in value.items()
        ]
    if is_collection:
        seen.add(id(value))
        return type(value), [_facts(each, seen) for each in value]
    if not _has_facts(value):
        return _Same(value)
    seen.add(id(value))
    left_out = keras_internals.UNREAD_BY_TRACES | {_PLACE}
    return (
        _Same(value),
        type(value),
        {
            name: _facts(each, seen)
            for name, each in vars(value).items()
            if name not in left_out
        },
    )


def _has_facts(value: Any) -> bool:
    """Whether what an object is shows in its attributes."""
    if isinstance(value, type | types.FunctionType | types.ModuleType):
        return False
    if isinstance(value, keras_internals.JOINTS):
        return False
    package = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and package not in (
        "tensorflow",
        "numpy",
        "threading",
        "logging",
    )
