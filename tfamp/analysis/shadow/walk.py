"""A traced step run operation by operation, beside itself in float32.

Each tensor has two values: what the step computes, and what it computes in
float32. An operation's own error is that of a third: its inputs in float32 are
rounded to what it takes, and it runs in 16 bits. What else the first differs
by, the operation inherited.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfamp.analysis.shadow.differences import (
    DISCRETE,
    ERROR,
    ZERO,
    Difference,
    difference,
    is_beyond_rounding,
)
from tfamp.analysis.shadow.execute import (
    DTYPES_16,
    Runner,
    is_narrow,
    narrowed,
    widened,
)
from tfamp.analysis.shadow.trace import StepGraph, behind
from tfamp.errors import InputError

# Roundings that add up, each of which is none too many.
_ADDED_UP = 0.5
# A sum as small by its terms is their rounding to float32, and no number: a
# softmax's gradient sums to 0, so that the bias of attention's keys has none.
_SUMS = ("BiasAddGrad", "Mean", "Sum")
_ROUNDED_TO_NOTHING = 2.0**-18
# What they find of rounded numbers is another thing, not a rounded one.
_EXACT = ("Cast", "Equal", "NotEqual")
_FAILURES = (tf.errors.OpError, TypeError, ValueError, AttributeError)
# They hand on what they get; who made it has the error.
_MOVES = frozenset(
    {
        "Cast",
        "Const",
        "EnsureShape",
        "ExpandDims",
        "Identity",
        "IdentityN",
        "PreventGradient",
        "Reshape",
        "Squeeze",
        "StopGradient",
        "Transpose",
    }
)


@dataclasses.dataclass(frozen=True)
class Seen:
    """An operation of 16 bits that made more than rounding.

    Attributes:
        operation: of the graph.
        dtype: what it computes in.
        own: what it made.
        total: what it gave on, with what it inherited.
    """

    operation: tf.Operation
    dtype: str
    own: Difference
    total: Difference | None


@dataclasses.dataclass(frozen=True)
class Walk:
    """What a step showed.

    Attributes:
        seen: the operations beyond rounding, in the order in which they ran.
        count: the operations that ran in 16 bits.
        results: by how much loss and gradients differ in all.
    """

    seen: tuple[Seen, ...]
    count: int
    results: tuple[Difference | None, ...]


def walk_step(
    step: StepGraph, batch: Sequence[Any], runner: Runner, factor: float
) -> Walk:
    """Runs a step on a batch.

    Args:
        step: traced.
        batch: flat, a value for each of the step's inputs.
        runner: of its operations.
        factor: multiplies the scaled losses.
    """
    operations = _needed(step)
    values = _Values(step, operations, batch, factor)
    seen, count = [], 0
    # What comes after what was told has its error from there.
    explained: set[int] = set()
    nothing: set[int] = set()
    for operation in operations:
        narrow, wide = values.of(operation)
        if narrow is None or wide is None:
            # It takes what could not be run.
            continue
        is_16_bit = is_narrow(operation)
        outputs = _run(runner, operation, narrow)
        others: list[Any]
        if operation.name in step.constants:
            others = [tf.constant(step.constants[operation.name])]
        elif _is_drawn(operation):
            others = [widened(each) for each in outputs]
        elif not is_16_bit and all(
            a is b for a, b in zip(narrow, wide, strict=True)
        ):
            others = outputs
        else:
            others = _run_in_float32(runner, operation, wide, outputs)
        count += is_16_bit
        follows = any(id(tensor) in explained for tensor in operation.inputs)
        found = None
        if _is_nothing(operation, wide, outputs, others, nothing):
            nothing.update(id(tensor) for tensor in operation.outputs)
            explained.update(id(tensor) for tensor in operation.outputs)
            values.add(operation, outputs, others)
            continue
        if is_16_bit:
            found = _own(runner, operation, narrow, wide, outputs, others)
        if found is None and not follows:
            found = _inherited(operation, outputs, others)
        if found is not None:
            seen.append(found)
        if found is not None or follows:
            explained.update(id(tensor) for tensor in operation.outputs)
        values.add(operation, outputs, others)
    return Walk(tuple(seen), count, values.results(nothing))


def _needed(step: StepGraph) -> list[tf.Operation]:
    """What loss and gradients come from; metrics and the like do not count."""
    needed = {each.name for each in behind(step.results)}
    return [
        operation
        for operation in step.graph.get_operations()
        if operation.name in needed and operation.type != "Placeholder"
    ]


class _Values:
    """What tensors hold while others still need them."""

    def __init__(self, step: StepGraph, operations, batch, factor: float):
        self._step = step
        self._narrow: dict[int, Any] = {}
        self._wide: dict[int, Any] = {}
        self._left = collections.Counter(
            id(tensor)
            for operation in operations
            for tensor in operation.inputs
        )
        self._left.update(id(tensor) for tensor in step.results)
        for inner, outer in zip(step.inputs, batch, strict=True):
            self._put(inner, tf.cast(tf.convert_to_tensor(outer), inner.dtype))
        for operation in step.graph.get_operations():
            if operation.type != "Placeholder":
                continue
            tensor = operation.outputs[0]
            if id(tensor) in step.captures:
                self._put(tensor, step.captures[id(tensor)])
            elif id(tensor) not in self._narrow:
                self._put(tensor, tf.constant(factor, tensor.dtype))

    def _put(self, tensor: tf.Tensor, value) -> None:
        self._narrow[id(tensor)] = value
        self._wide[id(tensor)] = (
            widened(value) if value.dtype in DTYPES_16 else value
        )

    def of(self, operation: tf.Operation) -> tuple[list | None, list | None]:
        """What an operation takes; None where it is not there."""
        keys = [id(tensor) for tensor in operation.inputs]
        if any(key not in self._narrow for key in keys):
            return None, None
        found = (
            [self._narrow[key] for key in keys],
            [self._wide[key] for key in keys],
        )
        for key in keys:
            self._left[key] -= 1
            if self._left[key] <= 0:
                self._narrow.pop(key, None)
                self._wide.pop(key, None)
        return found

    def add(self, operation: tf.Operation, narrow, wide) -> None:
        for tensor, a, b in zip(operation.outputs, narrow, wide, strict=True):
            if self._left[id(tensor)] > 0:
                self._narrow[id(tensor)], self._wide[id(tensor)] = a, b

    def results(self, nothing: set[int]) -> tuple[Difference | None, ...]:
        return tuple(
            None
            if id(t) in nothing
            else _difference([self._narrow[id(t)]], [self._wide[id(t)]])
            for t in self._step.results
            if id(t) in self._narrow
        )


def _is_nothing(operation, wide, outputs, others, nothing: set[int]) -> bool:
    """Whether it is a sum that is 0 but for rounding, or hands one on."""
    if _is_move(operation) and operation.inputs:
        return id(operation.inputs[0]) in nothing
    if operation.type not in _SUMS or not wide[0].dtype.is_floating:
        return False
    if not np.isfinite(_array(outputs[0])).all():
        return False
    terms = _array(wide[0]).astype("float64")
    result = _array(others[0]).astype("float64")
    if operation.type == "Mean" and result.size:
        result = result * (terms.size / result.size)
    size, of_terms = np.linalg.norm(result), np.linalg.norm(terms)
    return 0.0 < size <= _ROUNDED_TO_NOTHING * of_terms


def _run(runner: Runner, operation, inputs) -> list:
    try:
        return runner.run(operation, inputs, False)
    except _FAILURES as error:
        raise InputError(
            f"Operation {operation.name!r} ({operation.type}) cannot be run by"
            f" itself: {str(error).partition(chr(10))[0]}."
        ) from error


def _run_in_float32(runner: Runner, operation, inputs, outputs) -> list:
    """What it gives in float32; what it gave, where it has no such kernel."""
    try:
        return runner.run(operation, inputs, True)
    except _FAILURES:
        return [widened(each) for each in outputs]


def _own(runner, operation, narrow, wide, outputs, others) -> Seen | None:
    """What an operation makes of inputs that are right."""
    if _is_move(operation) or _is_drawn(operation):
        return None
    dtype = _dtype(operation)
    if dtype is None:
        return None
    given = [
        _rounded(a, b, tensor.dtype)
        for a, b, tensor in zip(narrow, wide, operation.inputs, strict=True)
    ]
    if all(a is b for a, b in zip(given, narrow, strict=True)):
        made = outputs
    else:
        made = _run(runner, operation, given)
    own = _difference(made, others)
    if own is None or not is_beyond_rounding(own, dtype):
        return None
    return Seen(operation, dtype, own, _difference(outputs, others))


def _inherited(operation, outputs, others) -> Seen | None:
    """What came of the roundings before, each of which was none too many."""
    if _is_move(operation) or not any(
        tensor.dtype.is_floating for tensor in operation.inputs
    ):
        return None
    total = _difference(outputs, others)
    if total is None or total.kind not in (DISCRETE, ERROR, ZERO):
        return None
    if total.kind == DISCRETE:
        if operation.type not in _EXACT:
            return None
    elif total.size < _ADDED_UP:
        return None
    return Seen(operation, _dtype(operation) or "float32", total, total)


def _is_move(operation: tf.Operation) -> bool:
    if operation.type not in _MOVES:
        return False
    # A float that becomes an index does not stay what it is.
    return operation.type != "Cast" or operation.outputs[0].dtype.is_floating


def _rounded(narrow, wide, dtype: tf.DType):
    if dtype == tf.variant or dtype == tf.resource:
        # A list of tensors has the dtype that it was made with.
        return narrow
    return narrowed(wide, dtype)


def _difference(narrow, wide) -> Difference | None:
    found = [
        difference(_array(a), _array(b))
        for a, b in zip(narrow, wide, strict=True)
        if a.dtype not in (tf.variant, tf.resource, tf.string)
    ]
    return max(
        (each for each in found if each is not None),
        key=lambda each: each.weight,
        default=None,
    )


def _array(tensor) -> np.ndarray:
    return widened(tensor).numpy()


def _dtype(operation: tf.Operation) -> str | None:
    tensors = [*operation.inputs, *operation.outputs]
    found = [t.dtype.name for t in tensors if t.dtype in DTYPES_16]
    return found[0] if found else None


def _is_drawn(operation: tf.Operation) -> bool:
    """Whether it is random, and so not the same in another dtype."""
    return "Random" in operation.type or "Multinomial" in operation.type
