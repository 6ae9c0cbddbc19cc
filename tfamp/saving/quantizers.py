"""The quantizers of LiteRT and of ONNX Runtime."""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tfamp.errors import InputError
from tfamp.precision.layer_paths import choose, walk
from tfamp.saving import onnx, shares
from tfamp.saving.served import SIGNATURE

KINDS = ("float16", "int8", "int4", "gptq")
# Of what is added up or normalized between them, 8 bits lose too much.
_PRODUCTS = (
    "FULLY_CONNECTED",
    "CONV_2D",
    "DEPTHWISE_CONV_2D",
    "CONV_2D_TRANSPOSE",
    "BATCH_MATMUL",
)
_ONNX_PRODUCTS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]
Batches = Sequence[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Made:
    """A file that was written, not yet run.

    Attributes:
        path: of the file, or of a folder.
        run: a function of a flat list of arrays.
        outputs: their names.
        runtime: of `run`.
        share: of the weights that are quantized, or None.
        is_static: whether activations are quantized by a calibration.
        again: exports a part of the model in the same way, and opens it.
    """

    path: pathlib.Path
    run: Callable[[list[np.ndarray]], list[np.ndarray]]
    outputs: list[str]
    runtime: str
    share: float | None = None
    is_static: bool = False
    again: Callable[[keras.Model], Callable] | None = None


def check(format: str, quantize: str | None) -> None:
    """Checks that a format has a quantizer, and that it is installed.

    Raises:
        InputError: it has none, or it is not installed.
    """
    if quantize is None:
        return
    if format == "saved_model":
        raise InputError(
            "TensorFlow has no quantizer of a SavedModel; use format "
            "'litert', 'onnx' or 'keras'."
        )
    if format == "keras" and quantize == "float16":
        raise InputError(
            "Keras has no quantizer to float16; tfamp.load_model(path, "
            "'mixed_float16') computes in it, whatever the file has."
        )
    if quantize == "gptq" and (
        format != "keras" or not hasattr(keras.quantizers, "GPTQConfig")
    ):
        raise InputError(
            f"GPTQ is Keras's, of 3.12 and later; this is {format} in Keras "
            f"{keras.__version__}. Use int4, or format 'keras'."
        )
    needed = {
        "litert": ("litert_quantizer", "ai_edge_litert"),
        "onnx": ("onnx", "tf2onnx", "onnxruntime", "onnx_ir"),
    }
    for name in needed.get(format, ()):
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"quantize={quantize!r} in {format} needs {name}, which is not "
                "installed: pip install 'tfamp[export]'."
            )


def layer_names(model: keras.Model, keep: Sequence[str]) -> list[str]:
    """The names of the layers that are to stay in float.

    Raises:
        InputError: there is no such layer.
    """
    layers = choose(walk(model), list(keep)) if keep else []
    return sorted({layer.name for layer in layers})


def store_in_float16(converter: Any) -> None:
    """Lets LiteRT's converter store weights in float16."""
    import tensorflow as tf

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]


def of_litert(
    file: pathlib.Path, kind: str, calibration: Batches, keep: list[str]
) -> tuple[pathlib.Path, float]:
    """A .tflite file quantized by litert-quantizer.

    Args:
        file: in float32, or in float16 where that is the kind.
        kind: of `KINDS`.
        calibration: batches of inputs by name; none for a dynamic one.
        keep: names of layers that stay in float.

    Returns:
        The new file, and the share of weights that are quantized.
    """
    if kind == "float16":
        if keep:
            raise InputError("LiteRT's float16 is of all layers; no keep=.")
        return file, shares.of_litert(file)
    from litert_quantizer import qtyping, quantizer, recipe
    from litert_quantizer.algorithm_manager import AlgorithmName

    target = file.with_name("quantized.tflite")
    is_static = kind == "int8" and bool(calibration)
    operations = qtyping.TFLOperationName
    with _quiet():
        made = quantizer.Quantizer(os.fspath(file))
        if is_static:
            for name in _PRODUCTS:
                made.add_static_config(".*", operations[name], 8, 8)
        elif kind == "int8":
            made.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        else:
            made.load_quantization_recipe(recipe.dynamic_wi4_afp32())
        for output in _outputs_of(file, keep):
            made.update_quantization_recipe(
                f"(^|;){re.escape(output)}($|;)",
                operations.ALL_SUPPORTED,
                algorithm_key=AlgorithmName.NO_QUANTIZE,
            )
        result = None
        if is_static:
            # In batches as they are: ranges are averaged over them, and those
            # of single rows would be too narrow.
            result = made.calibrate({SIGNATURE: list(calibration)})
        made.quantize(result, enable_progress_report=False).export_model(
            os.fspath(target)
        )
    return target, shares.of_litert(target)


def of_onnx(
    file: pathlib.Path, kind: str, calibration: Batches, keep: list[str]
) -> tuple[pathlib.Path, float]:
    """An .onnx file quantized by ONNX Runtime; as `of_litert`."""
    import onnx as onnx_format
    from onnxruntime import quantization

    target = file.with_name("quantized.onnx")
    with _quiet():
        nodes = onnx_format.load(file).graph.node
        kept = [
            node.name
            for node in nodes
            if any(_is_of(node.name, name) for name in keep)
        ]
        if kind == "float16":
            from onnxruntime.transformers import float16

            made = float16.convert_float_to_float16(
                onnx_format.load(file), keep_io_types=True, node_block_list=kept
            )
            onnx_format.save(made, target)
        elif kind == "int4":
            from onnxruntime.quantization import matmul_nbits_quantizer

            made = matmul_nbits_quantizer.MatMulNBitsQuantizer(
                onnx_format.load(file),
                block_size=32,
                is_symmetric=True,
                nodes_to_exclude=kept,
            )
            made.process()
            made.model.save_model_to_file(os.fspath(target))
        elif calibration:
            quantization.quantize_static(
                os.fspath(file),
                os.fspath(target),
                _Reader(calibration, file),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=_ONNX_PRODUCTS,
                per_channel=True,
                nodes_to_exclude=kept,
            )
        else:
            quantization.quantize_dynamic(
                os.fspath(file),
                os.fspath(target),
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=kept,
            )
    return target, shares.of_onnx(target)


QUANTIZE: dict[str, Callable] = {"litert": of_litert, "onnx": of_onnx}


class _Reader:
    """What ONNX Runtime's calibration reads."""

    def __init__(self, batches: Batches, file: pathlib.Path):
        taken = {each.name for each in onnx.session_of(file).get_inputs()}
        self._batches = iter(
            {name: x for name, x in batch.items() if name in taken}
            for batch in batches
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        del start_index, end_index


def _outputs_of(file: pathlib.Path, layers: list[str]) -> list[str]:
    """What the operations of some layers return, by name.

    An operation may be named after what follows it, and its weights after the
    layer.
    """
    if not layers:
        return []
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(
        schema.Model.GetRootAs(file.read_bytes(), 0)
    )
    found = []
    for graph in model.subgraphs:
        names = [tensor.name.decode() for tensor in graph.tensors]
        has_value = [
            model.buffers[tensor.buffer].data is not None
            for tensor in graph.tensors
        ]
        for operator in graph.operators:
            own = [names[i] for i in operator.outputs]
            own += [
                names[i] for i in operator.inputs if i >= 0 and has_value[i]
            ]
            if any(_is_of(name, layer) for name in own for layer in layers):
                found += [names[i] for i in operator.outputs]
    return found


def _is_of(name: str, layer: str) -> bool:
    """Whether an operation or a weight is named after a layer."""
    return bool(re.search(rf"(^|[/;]){re.escape(layer)}(_\d+)?/", name))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
