"""One operation of a graph run by itself, as it is or in float32."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.accumulation.kernels import adds_in_16_bits
from tfamp.accumulation.rewrite import kernel_of
from tfamp.analysis.shadow.float32_functions import as_function

DTYPES_16 = (tf.float16, tf.bfloat16)


class Runner:
    """Runs operations; what calls functions is imported once for all."""

    def __init__(self):
        self._functions: dict[tuple[str, bool], Any] = {}

    def run(
        self, operation: tf.Operation, inputs: Sequence, is_float32: bool
    ) -> list:
        """The outputs of an operation.

        Args:
            operation: of a graph.
            inputs: a tensor for each of its inputs.
            is_float32: whether 16 bits become float32 in it.
        """
        if operation.type == "Const":
            value = tf.constant(tf.make_ndarray(operation.get_attr("value")))
            return [widened(value) if is_float32 else value]
        if not is_float32 and _is_mended(operation):
            # `tfamp.fit` makes this sum in float32, and rounds it once.
            wide = self.run(operation, [widened(x) for x in inputs], True)
            return [
                narrowed(x, t.dtype)
                for x, t in zip(wide, operation.outputs, strict=True)
            ]
        if not _calls_functions(operation):
            return tensorflow_internals.run_operation(
                operation.type,
                len(operation.outputs),
                inputs,
                _attributes(operation, is_float32),
            )
        key = (operation.name, is_float32)
        if key not in self._functions:
            self._functions[key] = as_function(operation, is_float32)
        return _listed(self._functions[key](*inputs), operation)


def widened(tensor):
    """What has 16 bits in float32."""
    if isinstance(tensor, tf.Tensor) and tensor.dtype in DTYPES_16:
        return tf.cast(tensor, tf.float32)
    return tensor


def narrowed(tensor, dtype: tf.DType):
    """A float in a dtype of 16 bits, where that is the dtype."""
    if dtype in DTYPES_16 and tensor.dtype != dtype:
        return tf.cast(tensor, dtype)
    return tensor


def is_narrow(operation: tf.Operation) -> bool:
    """Whether an operation computes in 16 bits, or takes or gives them."""
    if any(t.dtype in DTYPES_16 for t in operation.outputs):
        return True
    if any(t.dtype in DTYPES_16 for t in operation.inputs):
        return True
    narrow = {dtype.as_datatype_enum for dtype in DTYPES_16}
    return any(
        attribute.type in narrow or narrow & set(attribute.list.type)
        for attribute in operation.node_def.attr.values()
    )


def _is_mended(operation: tf.Operation) -> bool:
    name = kernel_of(operation.node_def)
    if name is None:
        return False
    dtype = operation.get_attr("T")
    device = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    return dtype in DTYPES_16 and adds_in_16_bits(
        name, dtype.name, device, False
    )


def _calls_functions(operation: tf.Operation) -> bool:
    return any(
        attribute.HasField("func") or attribute.list.func
        for attribute in operation.node_def.attr.values()
    )


def _attributes(operation, is_float32: bool) -> list[Any]:
    """Names and values, one after the other, as the runtime takes them."""
    flat: list[Any] = []
    for attribute in operation.op_def.attr:
        value = _plain(operation.get_attr(attribute.name), is_float32)
        if attribute.type == "shape":
            value = _shape(value)
        elif attribute.type == "list(shape)":
            value = [_shape(each) for each in value]
        flat += [attribute.name, value]
    return flat


def _shape(value) -> list | None:
    shape = tf.TensorShape(value)
    return None if shape.rank is None else shape.as_list()


def _plain(value, is_float32: bool):
    if isinstance(value, list):
        return [_plain(each, is_float32) for each in value]
    if not isinstance(value, tf.DType):
        return value
    wide = is_float32 and value in DTYPES_16
    return (tf.float32 if wide else value).as_datatype_enum


def _listed(result, operation) -> list:
    if len(operation.outputs) == 0:
        return []
    if isinstance(result, tf.Tensor):
        return [result]
    return tf.nest.flatten(list(result))
