"""Traces: how they are counted, what they read, what is left of them."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

# What no later trace reads of a model or a layer: what fits, evaluations and
# calls set, while they run and for good; and books that are kept of the rest.
UNREAD_BY_TRACES = frozenset(
    {
        "_aggregate_additional_loss",
        "history",
        "stop_training",
        "stop_evaluating",
        "stop_predicting",
        "train_function",
        "test_function",
        "predict_function",
        "_losses",
        "_auto_config",
        "_build_shapes_dict",
        "_inbound_nodes",
        "_nodes",
        "_nodes_by_depth",
        "_operations_by_depth",
        "_outbound_nodes",
        "_self_unconditional_checkpoint_dependencies",
        "_self_unconditional_dependency_names",
        "_self_unconditional_deferred_dependencies",
        "_self_update_uid",
        "_tracker",
    }
)

# What joins the layers of a functional model: made once, and never changed.
JOINTS = (keras.KerasTensor, keras.src.ops.node.Node)


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
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        scope = graph._get_control_flow_context()
        while scope is not None:
            if scope.IsXLAContext():
                return True
            scope = scope.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


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
    module = sys.modules["tensorflow.python.framework.ops"]
    records = module.gradient_registry._registry
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
    module = sys.modules["tensorflow.python.ops.control_flow_v2_func_graphs"]
    for computing in _closed_over(gradient):
        for value in tf.nest.flatten(_closed_over(computing)):
            if isinstance(value, tf.Tensor) and hasattr(value, "graph"):
                graph = value.graph
                while isinstance(graph, module.ControlFlowFuncGraph):
                    graph = graph.outer_graph
                return graph
    return None


def _closed_over(function: Any) -> list[Any]:
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells]
