"""ONNX: a SavedModel as an .onnx file, and such a file as a function."""

import contextlib
import importlib.util
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from tfamp.errors import InputError
from tfamp.saving.served import SIGNATURE

SUFFIX = ".onnx"
# Has LayerNormalization, and ONNX Runtime of 2022 reads it.
_OPSET = 17
_COMPILED = "_XlaMustCompile"


def require() -> None:
    """Says how to install what is missing.

    Raises:
        InputError: tf2onnx, onnx or onnxruntime is not installed.
    """
    for name in ("onnx", "tf2onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"ONNX needs {name}, which is not installed: "
                "pip install 'tfamp[export]'."
            )


def convert(
    saved_model: str | os.PathLike,
    path: str | os.PathLike,
    inputs: list[str],
) -> None:
    """Writes a SavedModel as an .onnx file.

    Args:
        saved_model: with a signature of named inputs and outputs; changed.
        path: of the file.
        inputs: the names of its inputs.

    Raises:
        InputError: tf2onnx has no operation for a part of it.
    """
    require()
    with _quiet():
        import tf2onnx
        from tf2onnx import tf_loader

        _leave_to_inline(saved_model)
        loaded = tf.saved_model.load(os.fspath(saved_model))
        function = loaded.signatures[SIGNATURE]
        count = len(function.inputs) - len(function.captured_inputs)
        placeholders = {
            tensor.name: tensor.name.split(":")[0]
            for tensor in function.inputs[:count]
        }
        # A dict of outputs is flat in the order of its sorted keys.
        found = {
            tensor.name: name
            for name, tensor in zip(
                sorted(function.structured_outputs),
                function.outputs,
                strict=True,
            )
        }
        try:
            definition = tf_loader.from_function(
                function, list(placeholders), list(found)
            )
            _hold_captured(definition, function)
            write_erfc_with_erf(definition)
            tf2onnx.convert.from_graph_def(
                definition,
                input_names=list(placeholders),
                output_names=list(found),
                tensors_to_rename={
                    **{
                        tensor: _input_name(name, inputs)
                        for tensor, name in placeholders.items()
                    },
                    **found,
                },
                opset=_OPSET,
                output_path=os.fspath(path),
            )
        except Exception as error:
            raise InputError(f"tf2onnx: {_first_line(error)}") from error


def opened(
    path: str | os.PathLike, inputs: list[str], outputs: list[str]
) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """An .onnx file as a function of a flat list of arrays."""
    session = session_of(path)
    # What nothing depends on is not among a file's inputs.
    taken = {each.name for each in session.get_inputs()}

    def run(rows: list[np.ndarray]) -> list[np.ndarray]:
        feed = {
            name: x
            for name, x in zip(inputs, rows, strict=True)
            if name in taken
        }
        return session.run(outputs, feed)

    return run


def session_of(path: str | os.PathLike) -> Any:
    """An inference session of ONNX Runtime, on the CPU.

    Raises:
        InputError: it cannot be loaded: an operation that it does not know.
    """
    require()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise InputError(_reason(error)) from error


def runtime() -> str:
    """The name and version of what runs the files."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def write_erfc_with_erf(definition: tf.compat.v1.GraphDef) -> None:
    """Writes erfc(x) as 1 - erf(x), in a graph and its functions.

    ONNX has Erf alone, and TensorFlow writes the exact GELU with Erfc.
    """
    bodies = [
        definition.node,
        *(f.node_def for f in definition.library.function),
    ]
    for nodes in bodies:
        for node in [each for each in nodes if each.op == "Erfc"]:
            dtype = node.attr["T"]
            one, erf = nodes.add(), nodes.add()
            one.op, one.name = "Const", f"{node.name}/one"
            one.attr["dtype"].CopyFrom(dtype)
            one.attr["value"].tensor.CopyFrom(
                tf.make_tensor_proto(1.0, tf.as_dtype(dtype.type))
            )
            erf.op, erf.name = "Erf", f"{node.name}/erf"
            erf.attr["T"].CopyFrom(dtype)
            erf.input[:] = list(node.input)
            node.op = "Sub"
            is_function = nodes is not definition.node
            node.input[:] = [
                f"{one.name}:output:0" if is_function else one.name,
                f"{erf.name}:y:0" if is_function else erf.name,
            ]


def _leave_to_inline(saved_model: str | os.PathLike) -> None:
    """Has functions no longer kept whole for XLA.

    Keras's convolution in groups is one, and tf2onnx could not look into it.
    """
    file = pathlib.Path(saved_model) / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    for graph in saved.meta_graphs:
        functions = graph.graph_def.library.function
        nodes = [node for function in functions for node in function.node_def]
        for each in (*functions, *nodes, *graph.graph_def.node):
            if _COMPILED in each.attr:
                del each.attr[_COMPILED]
    file.write_bytes(saved.SerializeToString())


def _hold_captured(definition, function) -> None:
    """Makes constants of what a function took from outside, but weights."""
    count = len(function.captured_inputs)
    inner = function.inputs[len(function.inputs) - count :]
    values = {
        tensor.name.split(":")[0]: value
        for tensor, value in zip(inner, function.captured_inputs, strict=True)
        if tensor.dtype != tf.resource
    }
    for node in definition.node:
        if node.op == "Placeholder" and node.name in values:
            value = values[node.name]
            node.op = "Const"
            node.ClearField("attr")
            node.attr["dtype"].type = value.dtype.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(
                tf.make_tensor_proto(value.numpy(), value.dtype)
            )


def _input_name(placeholder: str, inputs: list[str]) -> str:
    name = placeholder.removeprefix(f"{SIGNATURE}_")
    return name if name in inputs else placeholder


def _reason(error: Exception) -> str:
    text = str(error)
    operation = re.search(r"No Op registered for (\w+)", text)
    node = re.search(r"Node ?\((.+?)\)|name: ?'?\"?([\w/.:;-]+)", text)
    where = f" ({node[1] or node[2]})" if node else ""
    if operation:
        return f"ONNX has no operation {operation[1]}{where}"
    return f"ONNX Runtime: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tf2onnx tells of each of its passes."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
