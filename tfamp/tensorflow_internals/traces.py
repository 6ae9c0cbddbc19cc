"""Traces: how they are counted, who compiles them, what is left of them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops
from tensorflow.python.ops import control_flow_v2_func_graphs


def graph_function(function: Callable, *, relaxes: bool = False) -> Callable:
    """A `tf.function` whose traces are counted by themselves.

    TensorFlow counts them by the code that is traced, whatever it closes over,
    and warns of the fifth: of five models, or five calls of `fit`. What has no
    code, as a partial, is counted alone.

    Args:
        function: any, of the caller's own; it is not converted by AutoGraph.
        relaxes: whether a second shape makes that axis unknown.
    """
    return tf.function(
        functools.partial(function), autograph=False, reduce_retracing=relaxes
    )


def is_compiled_by_xla() -> bool:
    """Whether what is traced here is for XLA: `jit_compile`, or a TPU."""
    if tf.executing_eagerly():
        return False
    return tf.__internal__.get_enclosing_xla_context() is not None


@contextlib.contextmanager
def differentiated_within() -> Iterator[None]:
    """Around all of a trace: what is traced is not differentiated later.

    TensorFlow makes a record wherever a function with a gradient of its own is
    traced, and never drops it, nor the graph that it holds. Here it is dropped.
    """
    yield
    if tf.executing_eagerly():
        return
    graph = tf.compat.v1.get_default_graph()
    records = ops.gradient_registry._registry
    # Copied in one step: while a list of pairs grows, garbage may be collected,
    # and in that another thread may add a record.
    for name, record in dict(records).items():
        if (
            name.startswith("CustomGradient-")
            and _traced_in(record["type"]) is graph
        ):
            records.pop(name, None)


def _traced_in(gradient: Callable) -> tf.Graph | None:
    """The graph of a function, loops and branches included, of a record."""
    inner = control_flow_v2_func_graphs.ControlFlowFuncGraph
    for computing in _closed_over(gradient):
        for value in tf.nest.flatten(_closed_over(computing)):
            if isinstance(value, tf.Tensor) and hasattr(value, "graph"):
                graph = value.graph
                while isinstance(graph, inner):
                    graph = graph.outer_graph
                return graph
    return None


def _closed_over(function: Any) -> list[Any]:
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells]
