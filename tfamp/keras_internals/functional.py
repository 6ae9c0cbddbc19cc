"""Models that are graphs of operations: what is in them, what they take."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

# A model that is a graph of operations, of which Keras has no public name.
Functional = keras.src.models.functional.Functional


def graph_steps(model: keras.Model) -> list[tuple[str, Any]]:
    """The names of what a functional model calls, in order, and the results.

    Results are symbolic, in the structure in which they are returned.
    """
    graph = getattr(model, "_functional", None) or model
    by_depth = getattr(graph, "_nodes_by_depth", {})
    return [
        (node.operation.name, node.outputs)
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if not node.is_input
    ]


def graph_inputs(model: keras.Model) -> Any:
    """The symbolic inputs of a functional model, as they were given."""
    graph = getattr(model, "_functional", None) or model
    return getattr(graph, "_inputs_struct", None)


def graph_operations(model: keras.Model) -> list:
    """The layers and operations that a functional model is a graph of."""
    graph = getattr(model, "_functional", model)
    return list(getattr(graph, "operations", ()))


def input_structure(model: keras.Model) -> Any:
    """The symbolic inputs, in the structure of the call; None where unknown."""
    graph = getattr(model, "_functional", None) or model
    structure: Any = getattr(graph, "_inputs_struct", None)
    is_sequence = isinstance(structure, (list, tuple)) and len(structure) == 1
    return structure[0] if is_sequence else structure


def input_name(tensor: Any) -> str | None:
    """The name of the `Input` that a symbolic tensor comes from."""
    history = getattr(tensor, "_keras_history", None)
    return getattr(history and history.operation, "name", None)


def input_dtype(model: keras.Layer) -> str | None:
    """What a Sequential casts its inputs to; None for what is none.

    A Sequential without an Input of its own gets one in the compute dtype of
    its first layer, so that ids and raw columns are rounded before that layer.
    """
    if not isinstance(model, keras.Sequential) or not model.built:
        return None
    functional = model._functional
    return None if functional is None else functional._inputs[0].dtype


def set_input_dtype(model: keras.Sequential, dtype: str) -> None:
    """Sets it. The tensor reads it at each call, the layer tells it a file."""
    tensor = model._functional._inputs[0]
    tensor._dtype = tensor._keras_history.operation._dtype = dtype


@contextlib.contextmanager
def input_dtypes_replaced(
    models: Sequence[keras.Model], dtypes: dict[str, str]
) -> Iterator[None]:
    """Within it functional models cast their inputs to other dtypes."""
    graphs = [getattr(model, "_functional", None) or model for model in models]
    tensors = [
        tensor
        for graph in graphs
        for tensor in getattr(graph, "_inputs", ())
        if tensor.dtype in dtypes
    ]
    before = [tensor._dtype for tensor in tensors]
    for tensor in tensors:
        tensor._dtype = dtypes[tensor._dtype]
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor._dtype = dtype
