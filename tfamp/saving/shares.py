"""How many of the weights in a file are stored in fewer bits than float32."""

import math
import pathlib
import re

import keras

from tfamp import keras_internals


def of_litert(file: pathlib.Path) -> float:
    """Of the elements of constants that LiteRT may quantize, those that are."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(
        schema.Model.GetRootAs(file.read_bytes(), 0)
    )
    kinds = schema.TensorType
    narrow = {
        value
        for name, value in vars(kinds).items()
        if name in ("INT8", "INT4", "INT2", "FLOAT16", "UINT8")
    }
    seen, quantized, total = set(), 0, 0
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            buffer = model.buffers[tensor.buffer]
            is_empty = buffer.data is None and not buffer.size
            if is_empty or tensor.buffer in seen:
                continue
            seen.add(tensor.buffer)
            count = math.prod(tensor.shape) if tensor.shape is not None else 1
            if tensor.type in narrow:
                quantized += count
                total += count
            elif tensor.type == kinds.FLOAT32:
                total += count
    return quantized / total if total else 0.0


def of_onnx(file: pathlib.Path) -> float:
    import onnx as onnx_format

    types = onnx_format.TensorProto
    narrow = {types.INT8, types.UINT8, types.INT4, types.UINT4, types.FLOAT16}
    quantized = total = 0
    for tensor in onnx_format.load(file).graph.initializer:
        # What a quantizer adds beside the weights.
        if re.search(r"(_scales?|_zero_points?)(_\w*)?$", tensor.name):
            continue
        count = math.prod(tensor.dims)
        if re.search(r"_Q4|_DQ_Q4|_Q4G", tensor.name):
            # Two in a byte.
            count *= 2 if tensor.data_type == types.UINT8 else 1
        if tensor.data_type in narrow:
            quantized += count
            total += count
        elif tensor.data_type == types.FLOAT:
            total += count
    return quantized / total if total else 0.0


def of_keras(model: keras.Model) -> float:
    quantized = total = 0
    for layer in keras_internals.all_layers(model):
        own = [] if keras_internals.sublayers(layer) else layer.variables
        for variable in own:
            dtype = keras.backend.standardize_dtype(variable.dtype)
            count = math.prod(variable.shape)
            if layer.quantization_mode and _is_beside_weights(variable.name):
                continue
            if dtype in ("int8", "uint8"):
                # 4 bits are packed, two in a byte.
                is_packed = layer.quantization_mode in ("int4", "gptq")
                count *= 2 if is_packed else 1
                quantized += count
            elif not dtype.startswith("float"):
                continue
            total += count
    return quantized / total if total else 0.0


def _is_beside_weights(name: str) -> bool:
    """Whether a variable is one of those that say what the bits stand for."""
    return "scale" in name or "zero" in name or name == "g_idx"
