"""What an export is asked for, checked before anything is written."""

import os
import pathlib
import re
import tempfile
from typing import Any

import keras
import tensorflow as tf

from tfamp.errors import InputError
from tfamp.precision.policy import (
    PRECISIONS,
    precision_of,
    resolve_precision,
)
from tfamp.precision.sensitive_layers import is_built
from tfamp.saving import litert, onnx, quantizers, signature
from tfamp.saving.load import load_model

FORMATS = ("saved_model", "litert", "onnx", "keras")
SUFFIXES = {"litert": litert.SUFFIX, "onnx": onnx.SUFFIX, "keras": ".keras"}
_CALIBRATION_BATCHES = 64
_COLORS = re.compile(r"\x1b\[[\d;]*m")
_WHERE = "Exception encountered when calling"


def checked_path(path: str | os.PathLike, format: str) -> pathlib.Path:
    """Where the file is to be, if one of the format can be there.

    Raises:
        InputError: there is something else, or the name does not suit.
    """
    if format not in FORMATS:
        raise InputError(
            f"Unknown format {format!r}; expected one of {', '.join(FORMATS)}."
        )
    if "://" in os.fspath(path):
        raise InputError(f"{os.fspath(path)!r} is no path on this machine.")
    path = pathlib.Path(path).expanduser().absolute()
    suffix = SUFFIXES.get(format)
    if suffix and path.suffix != suffix:
        raise InputError(
            f"{str(path)!r} must end in {suffix} for format {format!r}."
        )
    if format == "saved_model" and path.exists():
        is_one = (path / "saved_model.pb").exists()
        if not path.is_dir() or not (is_one or not any(path.iterdir())):
            raise InputError(
                f"{str(path)!r} is there and is no SavedModel; choose another "
                "path."
            )
    elif path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; expected a file.")
    return path


def checked_precision(
    model: keras.Model,
    format: str,
    precision: str,
    quantize: str | None,
    tolerance: float | None,
) -> str:
    """The precision by its full name, if all can be together.

    Raises:
        InputError: for what cannot be, or is not installed.
    """
    if not isinstance(model, keras.Model):
        raise InputError(
            f"Expected a keras.Model, got {type(model).__name__}; put a layer "
            "into keras.Sequential([layer])."
        )
    if not is_built(model):
        raise InputError(
            f"Model {model.name!r} is not built; call it once on a batch "
            "before export."
        )
    precision = resolve_precision(precision)
    if precision not in PRECISIONS:
        raise InputError(
            f"precision={precision!r} cannot be exported; expected one of "
            f"{', '.join(PRECISIONS)}."
        )
    if quantize is not None and quantize not in quantizers.KINDS:
        raise InputError(
            f"quantize={quantize!r}; expected None or one of "
            f"{', '.join(quantizers.KINDS)}."
        )
    if quantize and precision != "float32":
        raise InputError(
            f"quantize={quantize!r} begins with float32; leave out "
            f"precision={precision!r}."
        )
    quantizers.check(format, quantize)
    if format == "onnx":
        onnx.require()
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise InputError(f"tolerance={tolerance} must be a number from 0 on.")
    return precision


def batches_of(calibration: Any, quantize: str | None = None) -> list:
    """The batches of inputs to calibrate on; none for None.

    Raises:
        InputError: the data are empty, or there are none where they have to
            be.
    """
    if calibration is None:
        if quantize == "gptq":
            raise InputError(
                "quantize='gptq' fits kernels to data; give calibration=, a "
                "batch of inputs or a tf.data.Dataset."
            )
        return []
    if not isinstance(calibration, tf.data.Dataset):
        return [calibration]
    batches = [
        signature.inputs_of(element)
        for element in calibration.take(_CALIBRATION_BATCHES)
    ]
    if not batches:
        raise InputError("The calibration data ended before the first batch.")
    return batches


def in_precision(model: keras.Model, precision: str) -> keras.Model:
    """The model, or a copy of it where it has to be one of 16 bits."""
    if precision in ("float32", precision_of(model)):
        return model
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.keras")
        try:
            model.save(file)
            return load_model(file, precision, compile=False)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"Model {model.name!r} is in {precision_of(model)}, and cannot "
                f"be saved and loaded in {precision}: {first_line(error)}"
            ) from error


def first_line(error: Exception) -> str:
    """Of what an error says, but for where Keras says it was raised."""
    text = _COLORS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(_WHERE)]
    return (said or lines or [type(error).__name__])[0][:300]
