"""The kernels that TensorFlow has for GPUs, as its wheel lists them."""

import functools

from tensorflow.python.framework import kernels

# What has no kernel of its own: arguments, constants, calls of functions.
STRUCTURE = {"Placeholder", "_Arg", "_Retval", "NoOp", "Const"}

# Which kernels a GPU can be given, by TensorFlow's placer.
_DEVICES = ("GPU", "DEFAULT")


def is_call(node) -> bool:
    """Whether it calls a function, or several."""
    return any(
        value.HasField("func") or value.list.func
        for value in node.attr.values()
    )


def kernel_of(node):
    """That of a GPU for a node's dtypes; None where there is none."""
    found = [
        kernel
        for kernel in _kernels(node.op)
        if all(
            dtypes_of(node, limit.name) <= set(limit.allowed_values.list.type)
            for limit in kernel.constraint
            if limit.allowed_values.list.type
        )
    ]
    # TensorFlow prefers those that are for GPUs alone.
    return min(found, key=lambda k: _DEVICES.index(k.device_type), default=None)


@functools.cache
def _kernels(operation: str) -> list:
    return [
        kernel
        for kernel in kernels.get_registered_kernels_for_op(operation).kernel
        if kernel.device_type in _DEVICES
    ]


def dtypes_of(node, attribute: str) -> set[int]:
    """The dtypes that an attribute of a node names, by TensorFlow's numbers."""
    value = node.attr[attribute]
    return {value.type} if value.type else set(value.list.type)
