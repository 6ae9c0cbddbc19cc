"""The shadow: a training step beside itself in float32.

No rule says what to look for: whatever a model computes is computed twice.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.analysis.lint.scratch import NotTraced
from tfamp.analysis.shadow.differences import INFINITE, NAN
from tfamp.analysis.shadow.execute import Runner
from tfamp.analysis.shadow.report import CompareReport, MadeError
from tfamp.analysis.shadow.trace import StepGraph, trace_step
from tfamp.analysis.shadow.walk import Seen, Walk, walk_step
from tfamp.errors import InputError
from tfamp.precision.layer_paths import walk
from tfamp.precision.sensitive_layers import is_built

# How far the loss scale is taken back where only it is at fault.
_LOWEST_FACTOR = 2.0**-24


def compare(model: keras.Model, batch: Any) -> CompareReport:
    """Shows where in a training step 16 bits make error.

    Traces one step, forward, loss and backward, as `model.train_step` makes
    it, and runs it operation by operation, in the model's precision and in
    float32. Each operation of 16 bits is told by what itself makes of right
    inputs, so that what it inherits is not laid to its charge. Loops, branches
    and functions count as one operation. Under a strategy each replica's part
    of the batch is looked at by itself.

    The model stays as it is: nothing is applied, no state moves.

    Args:
        model: built and compiled.
        batch: an element of the training data, `(x, y)` or the like, or a
            `tf.data.Dataset`, of which the first is taken.

    Returns:
        The report: what made more than rounding, worst first.

    Raises:
        InputError: the model is not built or compiled, or its step cannot be
            traced.
    """
    if not isinstance(model, keras.Model):
        raise InputError(
            f"Expected a keras.Model, got {type(model).__name__}; put a layer"
            " into keras.Sequential([layer])."
        )
    if not model.compiled:
        raise InputError(
            f"Model {model.name!r} is not compiled; call model.compile(...)"
            " before compare: a step has a loss and gradients."
        )
    if not is_built(model):
        raise InputError(
            f"Model {model.name!r} is not built; call it once on a batch, or"
            " model.build(input_shape), before compare."
        )
    if isinstance(batch, tf.data.Dataset):
        batch = next(iter(batch), None)
    if batch is None:
        raise InputError("The data ended before the first batch.")
    walks, step = [], None
    for part in _parts(batch, model.distribute_strategy.num_replicas_in_sync):
        try:
            step = trace_step(model, part)
        except NotTraced as error:
            raise InputError(
                f"The training step of model {model.name!r} cannot be traced:"
                f" {error}"
            ) from error
        walks.append((step, _walk(step, part)))
    return _report(model, walks)


def _parts(batch: Any, replicas: int) -> Iterator[Any]:
    """Each replica's rows of a batch."""
    leaves = [x for x in keras.tree.flatten(batch) if np.ndim(x)]
    rows = min((len(x) for x in leaves), default=0)
    if replicas == 1 or rows < replicas:
        yield batch
        return
    for replica in range(replicas):
        begin, end = (
            rows * replica // replicas,
            rows * (replica + 1) // replicas,
        )
        yield keras.tree.map_structure(
            lambda x, a=begin, b=end: x[a:b] if np.ndim(x) else x, batch
        )


def _walk(step: StepGraph, batch: Any) -> Walk:
    leaves = [x for x in keras.tree.flatten(batch) if hasattr(x, "dtype")]
    runner, factor = Runner(), 1.0
    while True:
        found = walk_step(step, leaves, runner, factor)
        overflows = [x for x in found.seen if x.own.kind in (NAN, INFINITE)]
        is_scale = overflows and all(
            step.is_backward(each.operation) or _is_scaled_loss(step, each)
            for each in overflows
        )
        # As a dynamic scale does, before it counts as the model's fault.
        if not is_scale or factor <= _LOWEST_FACTOR:
            return found
        factor *= 2.0**-8


def _is_scaled_loss(step: StepGraph, seen: Seen) -> bool:
    return any(
        tensor is result
        for tensor in seen.operation.outputs
        for result in step.results
    )


def _report(model: keras.Model, walks) -> CompareReport:
    layers = {"": model} | {p.path: p.layer for p in walk(model)}
    grouped: dict[tuple, list[tuple[int, StepGraph, Seen]]] = {}
    for replica, (step, found) in enumerate(walks):
        for each in found.seen:
            key = (
                each.operation.type,
                step.layer(each.operation),
                step.line(each.operation),
                step.is_backward(each.operation),
            )
            grouped.setdefault(key, []).append((replica, step, each))
    errors = []
    for (kind, layer, line, is_backward), group in grouped.items():
        # The first of several as bad: what follows may have it from there.
        worst = max(group, key=lambda each: each[2].own.weight)[2]
        errors.append(
            MadeError(
                kind,
                layer,
                line,
                worst.dtype,
                is_backward,
                worst.own,
                worst.total,
                tuple(sorted({replica for replica, _, _ in group})),
                _fix(model, layer, layers.get(layer, model)),
            )
        )
    # Sorting keeps the order in which they ran among equals.
    errors.sort(key=lambda each: -each.own.weight)
    results = [each for _, found in walks for each in found.results]
    weighty = [each for each in results[1:] if each is not None]
    return CompareReport(
        model.name,
        tuple(errors),
        sum(found.count for _, found in walks),
        len(walks),
        results[0] if results else None,
        max(weighty, key=lambda each: each.weight, default=None),
    )


def _fix(model: keras.Model, path: str, layer: keras.layers.Layer) -> str:
    if not keras_internals.is_marked(model, "tfamp_keep_float32"):
        return "tfamp.keep_float32(model)"
    if not path or isinstance(layer, keras.Model):
        return 'x = keras.ops.cast(x, "float32")  # before this line'
    return f"tfamp.keep_float32(model, layers={path!r})"
