"""What a step moved before its optimizer finds that it does not count.

Batch normalization moves its averages in the forward pass, metrics count the
loss, and only after the backward pass is it known that the step is skipped.
`tfamp.fit` keeps that state itself. For other callers of an optimizer: a graph
holds what was assigned so far, and what was read of it before. Without a graph
`value_and_gradients` notes what its loss function assigns.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfamp import keras_internals

# Of what an optimizer assigns itself, in the names of operations.
SCOPE_OF_OPTIMIZER = "tfamp_optimizer"

_ASSIGNMENTS = (
    "AssignVariableOp",
    "AssignAddVariableOp",
    "AssignSubVariableOp",
)

_thread = threading.local()
# How many operations of a graph were looked at.
_seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Moved(NamedTuple):
    """A variable that was assigned to, and what it was before."""

    handle: tf.Tensor
    before: tf.Tensor


@contextlib.contextmanager
def kept_by_caller() -> Iterator[None]:
    """Within it, optimizers of this thread leave a step's state alone."""
    before = is_kept_by_caller()
    _thread.is_kept = True
    try:
        yield
    finally:
        _thread.is_kept = before


def is_kept_by_caller() -> bool:
    """Whether this thread is in `kept_by_caller`."""
    return getattr(_thread, "is_kept", False)


def moved_so_far() -> list[Moved]:
    """What the graph that is being traced has assigned to.

    Since this was asked before: what another optimizer applied since then is
    not to be undone. Not seeds: the next step is to draw anew. And not what
    was assigned without being read before, nor inside of called functions.
    """
    if tf.executing_eagerly():
        return []
    seed_dtype = tf.dtypes.as_dtype(keras_internals.seed_dtype())
    read: dict[str, tf.Tensor] = {}
    moved: dict[str, Moved] = {}
    graph = tf.compat.v1.get_default_graph()
    operations = graph.get_operations()
    begin = _seen.get(graph, 0)
    _seen[graph] = len(operations)
    for operation in operations[begin:]:
        is_read = operation.type == "ReadVariableOp"
        if not is_read and operation.type not in _ASSIGNMENTS:
            continue
        handle = operation.inputs[0]
        if is_read:
            read.setdefault(handle.name, operation.outputs[0])
        elif (
            handle.name not in moved
            and SCOPE_OF_OPTIMIZER not in operation.name
            and operation.get_attr("dtype") != seed_dtype
        ):
            before = read.get(handle.name)
            if before is not None:
                moved[handle.name] = Moved(handle, before)
    return list(moved.values())


def put_back(moved: list[Moved]) -> None:
    """Writes back what was there before."""
    for each in moved:
        tf.raw_ops.AssignVariableOp(resource=each.handle, value=each.before)


@contextlib.contextmanager
def noted_for(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Within it, what is assigned eagerly is noted for the optimizer."""
    if not tf.executing_eagerly() or is_kept_by_caller():
        yield
        return
    noted = _noted().setdefault(id(optimizer), {})
    seed_dtype = keras_internals.seed_dtype()

    def note(variable: keras.Variable) -> None:
        if id(variable) not in noted and variable.dtype != seed_dtype:
            value = keras_internals.uncast_value(variable)
            noted[id(variable)] = variable, value

    with keras_internals.assignments_noted(note):
        yield


def forget_noted(
    optimizer: keras.optimizers.Optimizer,
) -> Callable[[], None]:
    """Takes what was noted for an optimizer; what is returned puts it back."""
    noted = _noted().pop(id(optimizer), {})

    def put_back_noted() -> None:
        for variable, value in noted.values():
            variable.value.assign(value)

    return put_back_noted


def _noted() -> dict[int, dict[int, Any]]:
    return vars(_thread).setdefault("noted", {})
