"""A function that is traced, and then runs with its sums in float32."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.accumulation.kernels import adds_in_16_bits
from tfamp.accumulation.rewrite import sums_in_float32


def summing_in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function add in float32 what TensorFlow adds in 16 bits.

    It is to be called while a `tf.function` is traced: all that it does, in
    layers of users and in gradients too, is traced apart, changed
    (`tfamp.accumulation.rewrite`) and becomes part of the graph that is being
    made. Called eagerly, and on TPUs, which add in float32, it is as it was.
    All gradients are to be taken within it.

    Args:
        function: takes anything, and returns a structure of tensors and None.
    """
    # What was traced owns the Python functions that its graph calls.
    owners = []

    @functools.wraps(function)
    @tf.autograph.experimental.do_not_convert
    def run(*args: Any, **kwargs: Any) -> Any:
        if tf.executing_eagerly() or tf.config.list_logical_devices("TPU"):
            return function(*args, **kwargs)
        structure = None

        @tensorflow_internals.differentiated_within()
        def trace() -> list[tf.Tensor | None]:
            nonlocal structure
            structure = function(*args, **kwargs)
            return tf.nest.flatten(structure, expand_composites=True)

        traced = tf.function(trace, autograph=False).get_concrete_function()
        owners.append(traced)
        tensors, names = _inlined(traced)
        if names:
            # With the function goes what was made for it.
            weakref.finalize(
                traced, tensorflow_internals.forget_functions, names
            ).atexit = False
        outputs = iter(tensors)
        flat = tf.nest.flatten(structure, expand_composites=True)
        return tf.nest.pack_sequence_as(
            structure,
            [None if each is None else next(outputs) for each in flat],
            expand_composites=True,
        )

    return run


def _inlined(
    traced: tf.types.experimental.ConcreteFunction,
) -> tuple[list[tf.Tensor], list[str]]:
    """Makes a function without arguments a part of the current graph.

    Returns:
        Its outputs, and the names of functions that were registered for it.
    """
    graph = tf.compat.v1.get_default_graph()
    graph_def = traced.graph.as_graph_def()
    has_gpu = tf.config.list_logical_devices("GPU")
    names = []
    if sums_in_float32(graph_def, adds_in_16_bits, "GPU" if has_gpu else "CPU"):
        names = tensorflow_internals.register_functions(
            graph_def.library.function
        )
    captured = {
        inner.name: outer if _is_in(outer, graph) else graph.capture(outer)
        for inner, outer in zip(
            traced.inputs, traced.captured_inputs, strict=True
        )
    }
    outputs = tf.graph_util.import_graph_def(
        graph_def,
        input_map=captured,
        return_elements=[output.name for output in traced.outputs],
        name="float32_sums",
    )
    return outputs, names


def _is_in(tensor: tf.Tensor, graph: tf.Graph) -> bool:
    return tf.is_symbolic_tensor(tensor) and tensor.graph is graph
