"""LiteRT: a SavedModel as a .tflite file, and such a file as a function."""

import contextlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tfamp.errors import InputError
from tfamp.files.standard_error import caught
from tfamp.saving.served import SIGNATURE

SUFFIX = ".tflite"


def convert(
    saved_model: str | os.PathLike,
    path: str | os.PathLike,
    optimize: Callable[[Any], None] | None = None,
) -> None:
    """Writes a SavedModel as a .tflite file.

    Args:
        saved_model: with a signature of named inputs and outputs.
        path: of the file.
        optimize: told of the converter, before it runs.

    Raises:
        InputError: LiteRT has no operation for a part of it.
    """
    with _quiet():
        converter = tf.lite.TFLiteConverter.from_saved_model(
            os.fspath(saved_model), signature_keys=[SIGNATURE]
        )
        # TensorFlow's own operations would need its runtime beside LiteRT's.
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        if optimize is not None:
            optimize(converter)
        try:
            content = converter.convert()
        except Exception as error:
            raise InputError(_reason(error)) from error
    with open(path, "wb") as file:
        file.write(content)


def opened(
    path: str | os.PathLike, inputs: list[str], outputs: list[str]
) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """A .tflite file as a function of a flat list of arrays."""
    own = interpreter(path)
    with _quiet():
        runner = own.get_signature_runner(SIGNATURE)

    def run(rows: list[np.ndarray]) -> list[np.ndarray]:
        found = runner(**dict(zip(inputs, rows, strict=True)))
        return [np.array(found[name]) for name in outputs]

    return run


def interpreter(path: str | os.PathLike) -> Any:
    """LiteRT's interpreter, or where it is not installed TensorFlow's copy."""
    with _quiet():
        return _interpreter_class()(model_path=os.fspath(path), num_threads=1)


def runtime() -> str:
    """The name and version of what runs the files."""
    if _has_litert():
        from importlib import metadata

        return f"ai-edge-litert {metadata.version('ai-edge-litert')}"
    return f"tf.lite of TensorFlow {tf.__version__}"


def _interpreter_class() -> Any:
    if _has_litert():
        from ai_edge_litert import interpreter

        return interpreter.Interpreter
    return tf.lite.Interpreter


def _has_litert() -> bool:
    return importlib.util.find_spec("ai_edge_litert") is not None


def _reason(error: Exception) -> str:
    text = str(error)
    if "tensor list ops" in text or "TensorList" in text:
        return (
            "LiteRT cannot hold the loop of a recurrent layer with a batch of "
            "any size; fix it, keras.Input(batch_shape=[1, ...]), or use "
            "another format"
        )
    operations = sorted(
        set(re.findall(r"tf\.(\w+)\(", text))
        | set(re.findall(r"'tf\.(\w+)' op is neither", text))
    )
    if operations:
        scopes = re.findall(r'"([\w/]+/[\w/]+)@', text)
        where = f", in {scopes[0]}" if scopes else ""
        return (
            f"LiteRT has no operation for TensorFlow's {', '.join(operations)} "
            f"as it is used here{where}"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Before it, where in the graph, at length.
    said = lines[0].rpartition("error: ")[2] if lines else type(error).__name__
    return f"LiteRT's converter: {said}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """tf.lite tells with each call that LiteRT follows it.

    And its C++ code how it runs, or in many lines why it does not.
    """
    with caught(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
