"""Operations that call functions, such as loops, as functions of their own.

Each is imported into a graph that holds it alone, as it is or with every dtype
of 16 bits replaced by float32, down to the bodies of loops and branches.
"""

import itertools
import weakref
from collections.abc import Callable

import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.accumulation.rewrite import rename_functions

_numbers = itertools.count()

_NARROW = (
    tf.float16.as_datatype_enum,
    tf.bfloat16.as_datatype_enum,
)
_FLOAT32 = tf.float32.as_datatype_enum


def as_function(operation: tf.Operation, is_float32: bool) -> Callable:
    """One operation as a function of its inputs.

    Args:
        operation: of any type.
        is_float32: whether 16 bits become float32 in it.

    Returns:
        A function of a list of tensors that returns the list of its outputs.
    """
    definition = tf.compat.v1.GraphDef()
    full = operation.graph.as_graph_def()
    definition.versions.CopyFrom(full.versions)
    node = definition.node.add()
    node.CopyFrom(operation.node_def)
    node.name = "it"
    node.device = ""
    del node.input[:]
    names = [f"in{i}" for i in range(len(operation.inputs))]
    for name, tensor in zip(names, operation.inputs, strict=True):
        given = definition.node.add()
        given.op, given.name = "Placeholder", name
        given.attr["dtype"].type = tensor.dtype.as_datatype_enum
        node.input.append(name)
    definition.library.CopyFrom(full.library)
    registered: list[str] = []
    if is_float32:
        widen(definition)
        rename_functions(definition, f"_tfamp_shadow_{next(_numbers)}")
        registered = tensorflow_internals.register_functions(
            definition.library.function
        )

    def imported():
        tf.graph_util.import_graph_def(definition, name="")

    whole = tf.compat.v1.wrap_function(imported, [])
    pruned = whole.prune(
        [f"{name}:0" for name in names],
        [f"it:{i}" for i in range(len(operation.outputs))],
    )
    weakref.finalize(
        pruned, tensorflow_internals.forget_functions, registered
    ).atexit = False
    return pruned


def widen(definition: tf.compat.v1.GraphDef) -> None:
    """Replaces 16 bits by float32 in a graph and all its functions."""
    _widen_nodes(definition.node)
    for function in definition.library.function:
        signature = function.signature
        for argument in (*signature.input_arg, *signature.output_arg):
            if argument.type in _NARROW:
                argument.type = _FLOAT32
        _widen_nodes(function.node_def)


def _widen_nodes(nodes) -> None:
    for node in nodes:
        for attribute in node.attr.values():
            widen_attribute(attribute)


def widen_attribute(attribute) -> None:
    """Replaces 16 bits by float32 in one attribute of a node."""
    if attribute.type in _NARROW:
        attribute.type = _FLOAT32
    for i, each in enumerate(attribute.list.type):
        if each in _NARROW:
            attribute.list.type[i] = _FLOAT32
    if attribute.HasField("tensor") and attribute.tensor.dtype in _NARROW:
        value = tf.make_ndarray(attribute.tensor).astype("float32")
        attribute.tensor.CopyFrom(tf.make_tensor_proto(value))
