"""What variables are stored in; who reads them and assigns to them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp.keras_internals.replacing import of_threads, own_function


def stored(variable: keras.Variable) -> tf.Variable:
    """What a variable is kept in, whatever it is read as."""
    return variable._value


def uncast_value(variable: keras.Variable) -> tf.Tensor:
    """The value of a variable as it is stored, also inside a 16-bit layer."""
    with keras.src.backend.common.variables.AutocastScope(None):
        return tf.convert_to_tensor(variable.value)


def replace_value(
    variable: keras.Variable, value: tf.Variable, cls: type
) -> None:
    """Gives a variable another `tf.Variable`, and the methods of a class.

    Its dtype stays the one that it was declared with.
    """
    variable._value = value
    variable.__class__ = cls


@contextlib.contextmanager
def values_replaced(
    variables: Iterable[keras.Variable], dtype: str
) -> Iterator[None]:
    """Within it variables are kept, and read, in another dtype."""
    before = [(variable, variable._value) for variable in variables]
    for variable, value in before:
        variable._value = tf.Variable(
            tf.cast(value, dtype), trainable=False, name=variable.name
        )
    try:
        yield
    finally:
        for variable, value in before:
            variable._value = value


@contextlib.contextmanager
def reads_noted(
    variables: Sequence[keras.Variable],
    note: Callable[[keras.Variable], None],
) -> Iterator[None]:
    """Within it, a function is called each time that one of them is read."""

    def noting(cls: Any) -> type:
        def value(self):
            note(self)
            return cls.value.fget(self)

        return type(cls.__name__, (cls,), {"value": property(value)})

    before = [type(variable) for variable in variables]
    classes = {cls: noting(cls) for cls in set(before)}
    try:
        for variable, cls in zip(variables, before, strict=True):
            variable.__class__ = classes[cls]
        yield
    finally:
        for variable, cls in zip(variables, before, strict=True):
            variable.__class__ = cls


@contextlib.contextmanager
def assignments_noted(
    note: Callable[[keras.Variable], None],
) -> Iterator[None]:
    """Within it, `note` gets each variable that this thread assigns to.

    Before it does, by whichever method of `keras.Variable`.
    """
    cls = keras.src.backend.common.variables.Variable
    own = own_function(vars(cls)["assign"])

    def assign(variable, value):
        note(variable)
        return own(variable, value)

    with of_threads(cls, "assign").replaced(assign):
        yield


def in_stateless_scope() -> bool:
    """Whether variables have values given to them for a while."""
    return keras.src.backend.common.stateless_scope.in_stateless_scope()
