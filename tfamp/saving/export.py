"""Exporting a model to a file that was run before it is left.

One trace, a SavedModel, is what all formats are made of.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp.errors import InputError
from tfamp.saving import (
    asked,
    keras_file,
    litert,
    onnx,
    quantizers,
    served,
    signature,
    worst,
)
from tfamp.saving.agreement import Agreement, agreement
from tfamp.saving.report import ExportReport

# Relative to the largest output. Kernels of another library add up in another
# order; 16 bits round at each operation.
_TOLERANCES = {"float32": 1e-4, "mixed_bfloat16": 0.1, "mixed_float16": 0.02}
_ROWS = 32


def export(
    model: keras.Model,
    path: str | os.PathLike,
    format: str = "saved_model",
    precision: str = "float32",
    quantize: str | None = None,
    calibration: Any = None,
    *,
    tolerance: float | None = None,
    keep: Sequence[str] = (),
    batch: Any = None,
) -> ExportReport:
    """Writes a model for inference, in a file that was loaded and run.

    The model is traced in the precision that is asked for, whatever it was
    trained in; floats come in and go out in float32, and the batch may have
    any size. The file is run in its own runtime on a batch and on its first
    row, and compared with the model in float32. What cannot be written or run,
    or differs by more than the tolerance, is not left behind. The model stays
    as it is.

    Args:
        model: built.
        path: of the file: .tflite for "litert", .onnx for "onnx", .keras for
            "keras"; of a folder for "saved_model". Replaced where it is one
            already.
        format: "saved_model"; "litert"; "onnx", which needs
            `pip install 'tfamp[export]'`; or "keras", for Keras's quantizers.
        precision: "float32"; "mixed_bfloat16" or "mixed_float16" for products
            in 16 bits, where the format has them.
        quantize: how weights are stored: "float16", "int8" or "int4", by the
            quantizers of LiteRT, ONNX Runtime or Keras. The last two round
            activations too, by what each batch holds. Keras has "gptq" too:
            kernels in 4 bits, each fitted to what its layer takes.
        calibration: a `tf.data.Dataset` of `(x, y)` or `x`, or a batch of
            inputs. With `quantize="int8"`, LiteRT and ONNX round activations
            by what they were on it ("static"). "gptq" needs it.
        tolerance: the largest difference to the model in float32, relative to
            the largest magnitude of the output, or to 1 where that is less.
            None for 1e-4 in float32, 0.02 in float16 and 0.1 in bfloat16, and
            for any where weights are quantized.
        keep: names or paths of layers that are not quantized.
        batch: inputs to run the file on; None for those of `calibration`, or
            without it for random numbers.

    Returns:
        What was written, and how far it is from the model in float32.

    Raises:
        InputError: for what cannot be exported so, with the reason; nothing is
            left at the path but what was there before.
    """
    path = asked.checked_path(path, format)
    precision = asked.checked_precision(
        model, format, precision, quantize, tolerance
    )
    batches = asked.batches_of(calibration, quantize)
    tried = batches[0] if batch is None and batches else batch
    model = asked.in_precision(model, precision)
    specs = signature.signature_of(model, tried, format)
    flat = [signature.as_rows(specs, each, model) for each in batches]
    if tried is None:
        rows = signature.random_rows(specs, 8, model)
    else:
        rows = [
            x[:_ROWS] if np.ndim(x) else x
            for x in signature.as_rows(specs, tried, model)
        ]
    if tolerance is None and quantize is None:
        tolerance = _TOLERANCES[precision]
    expected = _expected(model, specs, rows)
    with _beside(path) as folder:
        try:
            if format == "keras":
                made = keras_file.write(
                    model,
                    specs,
                    folder,
                    quantize,
                    keep,
                    len(expected[0]),
                    flat,
                )
            else:
                made = _write(
                    model,
                    specs,
                    folder,
                    format,
                    precision,
                    quantize,
                    flat,
                    keep,
                )
            found = _ran(made.run, rows, specs)
        except InputError as error:
            raise InputError(f"{_named(model, format)}: {error}") from error
        except MemoryError:
            raise
        except OSError as error:
            raise InputError(
                f"{str(path)!r} cannot be written: {error.strerror or error}."
            ) from error
        except Exception as error:
            raise InputError(
                f"{_named(model, format)} cannot be written and run: "
                f"{type(error).__name__}: {asked.first_line(error)}"
            ) from error
        outputs = found[0]
        seen = _worst(found, expected)
        if tolerance is not None and not seen.relative_difference <= tolerance:
            where = worst.layer(model, specs, rows, made.again, tolerance)
            name = made.outputs[seen.worst_output]
            raise InputError(
                f"{_named(model, format)} differs from it in float32 by "
                f"{seen.relative_difference:.2g} of the largest output, more "
                f"than tolerance={tolerance:g}, in {name!r}"
                f"{f', from layer {where!r} on' if where else ''}."
            )
        if quantize and not np.isfinite(seen.largest_difference):
            raise InputError(
                f"{_named(model, format)} in {quantize} returns what is not "
                "finite, or of another shape, where it is finite in float32."
            )
        size = _bytes(made.path)
        _move(made.path, path)
    return ExportReport(
        path=str(path),
        format=format,
        precision=precision,
        quantize=quantize,
        is_static=made.is_static,
        runtime=made.runtime,
        bytes=size,
        inputs=tuple(
            {
                "name": spec.name,
                "dtype": spec.dtype.name,
                "shape": spec.shape.as_list(),
            }
            for spec in keras.tree.flatten(specs)
        ),
        outputs=tuple(
            {
                "name": name,
                "dtype": x.dtype.name,
                "shape": list(x.shape),
            }
            for name, x in zip(made.outputs, outputs, strict=True)
        ),
        rows=len(rows[0]) if np.ndim(rows[0]) else 1,
        batch="random" if tried is None else "given",
        largest_difference=seen.largest_difference,
        relative_difference=seen.relative_difference,
        tolerance=tolerance,
        same_choice=seen.same_choice,
        quantized_share=made.share,
        float_layers=tuple(keep),
    )


def opened(
    report: ExportReport, model: keras.Model
) -> Callable[[Any], list[np.ndarray]]:
    """What was exported as a function of a batch of inputs.

    Args:
        report: of `export`, whose file is still there.
        model: that was exported, for the structure of its inputs.

    Returns:
        A function that returns a flat list of arrays.
    """
    names = [each["name"] for each in report.inputs]
    outputs = [each["name"] for each in report.outputs]
    if report.format == "keras":
        return keras_file.opened(report.path)
    run = _OPEN[report.format](report.path, names, outputs)
    specs = [
        tf.TensorSpec(each["shape"], each["dtype"], each["name"])
        for each in report.inputs
    ]

    def run_batch(batch: Any) -> list[np.ndarray]:
        return run(signature.as_rows(specs, batch, model))

    return run_batch


def _write(
    model, specs, folder, format, precision, quantize, calibration, keep
) -> quantizers.Made:
    inputs = [spec.name for spec in keras.tree.flatten(specs)]

    def made(model, name: str):
        """A SavedModel, and the file that the format makes of it."""
        source = folder / f"{name}-source"
        with served.computing(model, precision):
            outputs = served.write(model, specs, source, precision)
        if format == "saved_model":
            return source, outputs
        target = folder / f"{name}{asked.SUFFIXES[format]}"
        if format == "litert":
            litert.convert(source, target, _optimization(quantize))
        else:
            onnx.convert(source, target, inputs)
        return target, outputs

    def again(part):
        target, outputs = made(part, "part")
        return _OPEN[format](target, inputs, outputs)

    file, outputs = made(model, "model")
    share = None
    is_static = quantize == "int8" and bool(calibration)
    if quantize:
        file, share = quantizers.QUANTIZE[format](
            file,
            quantize,
            [dict(zip(inputs, batch, strict=True)) for batch in calibration],
            quantizers.layer_names(model, keep),
        )
    return quantizers.Made(
        path=file,
        run=_OPEN[format](file, inputs, outputs),
        outputs=outputs,
        runtime=_RUNTIMES[format](),
        share=share,
        is_static=is_static,
        again=None if quantize else again,
    )


_OPEN: dict[str, Callable] = {
    "saved_model": served.opened,
    "litert": litert.opened,
    "onnx": onnx.opened,
}
_RUNTIMES: dict[str, Callable[[], str]] = {
    "saved_model": lambda: f"TensorFlow {tf.__version__}",
    "litert": litert.runtime,
    "onnx": onnx.runtime,
}


def _optimization(quantize):
    return quantizers.store_in_float16 if quantize == "float16" else None


def _expected(model, specs, rows) -> list[list[np.ndarray]]:
    """What the model makes of the rows, and of their first, in float32."""
    with served.computing(model, "float32"):
        try:
            all_rows = served.call(model, specs, rows)
            again = served.call(model, specs, rows)
            first = served.call(model, specs, _first(rows, specs))
        except Exception as error:
            raise InputError(
                f"Model {model.name!r} cannot be called on a batch: "
                f"{type(error).__name__}: {asked.first_line(error)}"
            ) from error
    if agreement(again, all_rows).largest_difference:
        raise InputError(
            f"Model {model.name!r} returns something else each time: it draws "
            "random numbers at inference or keeps a state, and no file of it "
            "can be compared."
        )
    return [all_rows, first]


def _ran(run, rows, specs) -> list[list[np.ndarray]]:
    # Of another size than the other batch: a file may be fixed to one.
    return [run(rows), run(_first(rows, specs))]


def _first(rows, specs):
    return [
        x[:1] if spec.shape.rank and spec.shape[0] is None else x
        for x, spec in zip(rows, keras.tree.flatten(specs), strict=True)
    ]


def _worst(found, expected) -> Agreement:
    both = [agreement(a, b) for a, b in zip(found, expected, strict=True)]
    worse = max(both, key=lambda each: each.relative_difference)
    return dataclasses.replace(
        worse,
        largest_difference=max(each.largest_difference for each in both),
        same_choice=both[0].same_choice,
    )


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder from which a file can be moved to the path at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be written: {error.strerror or error}."
        ) from error
    try:
        yield pathlib.Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(made: pathlib.Path, path: pathlib.Path) -> None:
    if made.is_dir() and path.is_dir():
        # A folder cannot be replaced at once; the old one goes last.
        former = made.with_name("former")
        os.rename(path, former)
    os.replace(made, path)


def _bytes(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())


def _named(model, format) -> str:
    return f"Model {model.name!r} as {format}"
