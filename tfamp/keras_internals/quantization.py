"""Kernels of 4 and 8 bits: Keras's ways there, and what its files forget."""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp.keras_internals.functional import Functional
from tfamp.keras_internals.layers import all_layers, sublayers
from tfamp.keras_internals.replacing import methods_replaced

# Of the mean of the diagonal, as Keras has it.
_DAMPING = 0.01


def quantize(
    model: keras.Model, kind: str, keep: Iterable[keras.layers.Layer]
) -> None:
    """Keras's `quantize`, but of some layers.

    Keras takes a filter since 3.13 only.
    """
    with contextlib.ExitStack() as stack:
        for layer in keep:
            stack.enter_context(
                methods_replaced(layer, quantize=lambda *_, **__: None)
            )
        model.quantize(kind)
    _tell_of_sublayers(model)


def quantize_with_gptq(
    model: keras.Model,
    keep: Collection[keras.layers.Layer],
    run: Callable[[], object],
) -> None:
    """Keras's GPTQ, in 4 bits, of the dense layers of any model.

    Keras itself takes chains of blocks on token ids alone, reads the inputs
    of a layer's `call` when it is no longer called, corrects too much, and
    spoils rows of one sign.

    Args:
        model: whose layers are changed.
        keep: layers that stay as they are.
        run: calls the model on what its layers are to be fitted to.
    """
    module = keras.src.quantizers.gptq
    config = keras.quantizers.GPTQConfig(None, None, group_size=128)
    fits = [
        (layer, module.GPTQ(layer, config))
        for layer in model._flatten_layers()
        if layer not in keep and _is_fitted_by_gptq(layer)
    ]
    with contextlib.ExitStack() as stack:
        for layer, fit in fits:
            stack.enter_context(
                methods_replaced(layer, call=_told(layer.call, fit))
            )
        run()
    for layer, fit in fits:
        layer.quantize("gptq", config=config)
        factor = _factor_of_inverse(np.asarray(fit.hessian, "float64"))
        with methods_replaced(
            module,
            gptq_quantize_matrix=_mended(module.gptq_quantize_matrix, factor),
        ):
            fit.quantize_and_correct_layer()
    _tell_of_sublayers(model)


def lost_at_saving(model: keras.Model) -> list[int]:
    """Which of `all_layers` are quantized, and would be loaded as plain ones.

    A layer that makes others itself, and gives them no policy, has such.
    """
    lost = set()
    for layer in _making_others(model):
        try:
            again = type(layer).from_config(layer.get_config())
            again.build_from_config(layer.get_build_config())
            modes = {
                each.path: each.quantization_mode
                for each in again._flatten_layers()
            }
        except Exception:
            modes = {}
        lost |= {
            each
            for each in layer._flatten_layers(include_self=False)
            if each.quantization_mode != modes.get(each.path)
        }
    return [i for i, each in enumerate(all_layers(model)) if each in lost]


@contextlib.contextmanager
def saved_whole(model: keras.Model) -> Iterator[None]:
    """Within it a model that GPTQ quantized is saved as it can be loaded.

    Keras 3.15 leaves out the numbers that stand for 0.
    """
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if layer.quantization_mode == "gptq":
                save = functools.partial(_save_gptq_variables, layer)
                stack.enter_context(
                    methods_replaced(layer, save_own_variables=save)
                )
        yield


def _is_fitted_by_gptq(layer: keras.layers.Layer) -> bool:
    """Whether Keras knows which axes of a kernel are the rows of a matrix."""
    if type(layer) is keras.layers.Dense:
        return True
    if type(layer) is not keras.layers.EinsumDense or layer.kernel.ndim > 3:
        return False
    inputs, kernel, outputs = re.split(",|->", layer.equation)
    summed = "".join(letter for letter in kernel if letter not in outputs)
    # Keras goes by which axis is the longest one.
    rows = keras.src.quantizers.gptq.GPTQ(layer).rows
    return (
        bool(summed)
        and kernel.startswith(summed)
        and inputs.endswith(summed)
        and not set(kernel.removeprefix(summed)) & set(inputs)
        and int(rows) == math.prod(layer.kernel.shape[: len(summed)])
    )


def _told(call: Callable, fit: Any) -> Callable:
    def told(inputs, *args, **kwargs):
        fit.update_hessian_with_batch(
            keras.ops.reshape(inputs, (-1, int(fit.rows)))
        )
        return call(inputs, *args, **kwargs)

    return told


def _mended(quantize_matrix: Callable, factor: np.ndarray) -> Callable:
    def mended(weights, inv_hessian, compute_scale_zero, **options):
        del inv_hessian, compute_scale_zero
        return quantize_matrix(
            weights,
            inv_hessian=keras.ops.cast(factor, "float32"),
            compute_scale_zero=_scale_and_zero,
            **options,
        )

    return mended


def _scale_and_zero(weights: tf.Tensor) -> tuple:
    """What 0 to 15 stand for, by row.

    Without 0 among it a row of one sign would have a negative number stand
    for 0, which Keras stores as a positive one.
    """
    array = np.asarray(weights, "float32")
    low = np.minimum(array.min(1, keepdims=True), 0)
    span = np.maximum(array.max(1, keepdims=True), 0) - low
    scale = np.where(span == 0, 1, span) / np.float32(15)
    zero = np.round(-low / scale)
    tensor = keras.ops.convert_to_tensor
    return tensor(scale, "float32"), tensor(zero, "uint8"), 15.0


def _factor_of_inverse(hessian: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse (Frantar et al. 2022, 3.3).

    Its rows are those of the inverses of what is left after each row is
    rounded. Keras takes the first inverse for all, and corrects too much.
    """
    diagonal = np.diag(hessian).copy()
    diagonal[diagonal == 0] = 1
    damped = hessian.copy()
    np.fill_diagonal(damped, diagonal + _DAMPING * diagonal.mean())
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def _making_others(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The outermost layers whose sublayers no config lists."""
    if isinstance(layer, (keras.Sequential, Functional)):
        return [one for each in layer.layers for one in _making_others(each)]
    return [layer] if sublayers(layer) else []


def _tell_of_sublayers(model: keras.Model) -> None:
    """Has configs say how the layers in a layer are quantized.

    As Keras advises in `DTypePolicyMap`; its own attention does not.
    """
    for layer in _making_others(model):
        policies = {
            each.path: each.dtype_policy
            for each in layer._flatten_layers(include_self=False)
            if each.quantization_mode
        }
        if policies:
            policy = keras.dtype_policies.DTypePolicyMap(
                layer.dtype_policy, policies
            )
            object.__setattr__(layer, "_dtype_policy", policy)


def _save_gptq_variables(layer: keras.layers.Layer, store: dict) -> None:
    names = layer.variable_serialization_spec["gptq"]
    values = [getattr(layer, name) for name in names]
    there = [value for value in values if value is not None]
    for i, value in enumerate(there):
        store[str(i)] = value
