"""The training step that is looked at, as a graph with places and lines."""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.analysis.lint.scratch import (
    NotTraced,
    first_line,
    marked,
    placeholder,
    scopes_of,
    scratch_graph,
    untouched,
)
from tfamp.analysis.lint.source import line_of
from tfamp.analysis.lint.step import noted
from tfamp.precision.layer_paths import Place, walk

_DTYPES_16 = (tf.float16, tf.bfloat16)
_SCOPE = re.compile(r"(?:^|/)(tfamp\.\d+)/")
# How many operations to look through for the layer of a custom gradient.
_NEAR = 32


@dataclasses.dataclass(frozen=True)
class StepGraph:
    """A traced step.

    Attributes:
        graph: the operations, in an order in which they can run.
        inputs: the placeholders of the batch, flat.
        captures: what else it takes, by the id of the inner tensor.
        results: the loss and the gradients that the optimizers get.
        forward: the names of the operations that the losses come from.
        scopes: name scope to layer's path.
        constants: what code gave for a constant that 16 bits rounded, by the
            name of its operation.
    """

    graph: tf.Graph
    inputs: tuple[tf.Tensor, ...]
    captures: dict[int, Any]
    results: tuple[tf.Tensor, ...]
    forward: frozenset[str]
    scopes: dict[str, str]
    constants: dict[str, np.ndarray]

    def layer(self, operation: tf.Operation) -> str:
        """The path of the innermost layer that an operation is in.

        The code of a custom gradient is in the layer whose tensors it takes.
        """
        pending, seen = [operation], 0
        while pending and seen < _NEAR:
            each, seen = pending.pop(0), seen + 1
            found = _SCOPE.findall(each.name)
            if found:
                return self.scopes.get(found[-1], "")
            if operation.name in self.forward:
                return ""
            for tensor in each.inputs:
                # TensorFlow puts one around what has a gradient of its own.
                around = [
                    user
                    for user in tensor.consumers()
                    if user.type == "IdentityN" and user.name in self.forward
                ]
                pending += around[:1] or [tensor.op]
        return ""

    def is_backward(self, operation: tf.Operation) -> bool:
        """Whether an operation belongs to a gradient."""
        return operation.name not in self.forward

    def line(self, operation: tf.Operation) -> str:
        """The line of somebody's own code that made it, or ""."""
        return line_of(self._forward_of(operation))

    def _forward_of(self, operation: tf.Operation) -> tf.Operation:
        """For a gradient what it is the gradient of, if that can be told."""
        if "gradient_tape/" not in operation.name:
            return operation
        parts = operation.name.split("gradient_tape/")[-1].split("/")
        for end in range(len(parts), 0, -1):
            with contextlib.suppress(KeyError, ValueError):
                return self.graph.get_operation_by_name("/".join(parts[:end]))
        return operation


def trace_step(model: keras.Model, batch: Any) -> StepGraph:
    """Traces `model.train_step` on placeholders like a batch.

    Raises:
        NotTraced: it cannot be called on placeholders.
    """
    places = tuple(walk(model))
    step = _trace(model, places, batch)
    layers = [
        each
        for each in keras_internals.all_layers(model)
        if each.quantization_mode is None
    ]
    float32 = keras.dtype_policies.get("float32")
    try:
        with keras_internals.dtype_policy_replaced(layers, float32):
            wide = _trace(model, places, batch)
    except NotTraced:
        return step
    return dataclasses.replace(step, constants=_true_constants(step, wide))


def _trace(
    model: keras.Model, places: Sequence[Place], batch: Any
) -> StepGraph:
    optimizers = [
        value
        for value in vars(model).values()
        if isinstance(value, keras.optimizers.Optimizer)
    ]
    for place in places:
        optimizers += [
            value
            for value in vars(place.layer).values()
            if isinstance(value, keras.optimizers.Optimizer)
        ]
    optimizers = list({id(each): each for each in optimizers}.values())
    with untouched(model, places), scratch_graph() as graph:
        data = keras.tree.map_structure(placeholder, batch)
        with (
            keras_internals.loss_and_metrics_unbuilt(model),
            marked(model, places, []),
            noted(optimizers) as notes,
        ):
            try:
                model.train_step(data)
            # The model's own code runs here, and may raise anything.
            except Exception as error:
                raise NotTraced(first_line(error)) from error
    losses = [each for note in notes for each in note.scaled_losses]
    results = losses + [each for note in notes for each in note.gradients]
    return StepGraph(
        graph,
        tuple(
            leaf
            for leaf in keras.tree.flatten(data)
            if isinstance(leaf, tf.Tensor)
        ),
        {id(inner): outer for outer, inner in graph.captures},
        tuple(each for each in results if isinstance(each, tf.Tensor)),
        frozenset(each.name for each in behind(losses)),
        scopes_of(places),
        {},
    )


def behind(tensors: Iterable[tf.Tensor]) -> list[tf.Operation]:
    """The operations that tensors come from."""
    found: dict[str, tf.Operation] = {}
    pending = [tensor.op for tensor in tensors]
    while pending:
        operation = pending.pop()
        if operation.name not in found:
            found[operation.name] = operation
            pending.extend(tensor.op for tensor in operation.inputs)
    return list(found.values())


def _true_constants(narrow: StepGraph, wide: StepGraph) -> dict:
    """Constants of 16 bits as the code gave them.

    Told by the same code traced in float32, layer by layer.
    """
    found: dict[str, np.ndarray] = {}
    ours, theirs = _constants(narrow), _constants(wide)
    for layer, operations in ours.items():
        others = theirs.get(layer, [])
        if len(others) != len(operations):
            continue
        for operation, other in zip(operations, others, strict=True):
            value = _value(other)
            if (
                operation.outputs[0].dtype in _DTYPES_16
                and other.outputs[0].shape == operation.outputs[0].shape
            ):
                found[operation.name] = value.astype("float32")
    return found


def _constants(step: StepGraph) -> dict[str, list[tf.Operation]]:
    found: dict[str, list[tf.Operation]] = {}
    for operation in step.graph.get_operations():
        if (
            operation.type == "Const"
            and operation.outputs[0].dtype.is_floating
            and "gradient_tape/" not in operation.name
        ):
            found.setdefault(step.layer(operation), []).append(operation)
    return found


def _value(constant: tf.Operation) -> np.ndarray:
    return tf.make_ndarray(constant.get_attr("value"))
