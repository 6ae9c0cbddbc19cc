"""What the runtime is told and asked by operation, past `tf.function`."""

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context, execute


def register_functions(definitions: Iterable[Any]) -> list[str]:
    """Tells the runtime of functions of a graph, for it to find by name.

    It looks for the bodies of loops and branches so, and an import of a graph
    tells that graph only.

    Args:
        definitions: `FunctionDef`s, of names that nobody has used.

    Returns:
        Their names, for `forget_functions`.
    """
    names = []
    for definition in definitions:
        context.context().add_function_def(definition)
        names.append(definition.signature.name)
    return names


def forget_functions(names: Iterable[str]) -> None:
    """Undoes `register_functions`, for those that are still there."""
    for name in names:
        if context.context().has_function(name):
            context.context().remove_function(name)


def run_operation(
    operation_type: str,
    num_outputs: int,
    inputs: Sequence[tf.Tensor],
    attributes: Sequence[Any],
) -> list[tf.Tensor]:
    """Runs one operation, with the attributes that it has in a graph.

    `tf.raw_ops` finds out dtypes from what it is given, does not have all
    operations, and names what is known here by its place.

    Args:
        operation_type: as a graph names it.
        num_outputs: how many it has.
        inputs: its inputs, lists of them flattened.
        attributes: names and values, one after the other.
    """
    return execute.execute(
        operation_type.encode(),
        num_outputs,
        list(inputs),
        tuple(attributes),
        context.context(),
    )
