"""What the functions of Keras and TensorFlow do inside a kept layer.

Each `replacement` asks for the region of its thread, and calls what it stands
for where there is none.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.formats import FORMATS
from tfamp.precision import contractions, raw_data, regions
from tfamp.precision.meant import (
    DTYPES_16,
    as_it_is,
    as_meant,
    dtype_name,
    float32_value,
    has_16_bits,
    has_float32,
    is_rounded,
    leaves_of,
    mapped,
    mark,
    mark_rounded,
    meant,
    meant_dtype,
    meant_dtypes,
)
from tfamp.precision.operations import SEQUENCES
from tfamp.precision.regions import Region

# A multiplication computes in what its operands have.
_KINDS = {"product": "product", "sum": "float32", "multiplication": None}


def run(region: Region, function: Callable, args, kwargs):
    """Calls a function in a region; its dtypes are as ever."""
    with regions.within(region):
        return as_meant(function(*args, **kwargs))


def operation(
    name: str, function: Callable, by_keras: bool, is_reflected: bool = False
) -> Callable:
    """What stands in the place of an operation.

    Args:
        name: its row in the table of `operations`.
        function: what it stands for.
        by_keras: whether that is Keras's.
        is_reflected: whether its operands come in the other order.
    """
    dtype_position = _dtype_position(function)

    @functools.wraps(function)
    def replacement(*args, **kwargs):
        region = regions.active()
        if region is None:
            return function(*args, **kwargs)
        with regions.within(None):
            row = name
            if name == "multiply" and len(args) > 1 and args[0] is args[1]:
                row = "square"
            kind = _kind(region, row, args, kwargs, is_reflected)
            if region.is_float32:
                result = _compute_wide(region, kind, function, args, kwargs)
            elif kind == "made":
                result = _make(
                    region,
                    name,
                    function,
                    args,
                    kwargs,
                    dtype_position,
                    by_keras,
                )
            else:
                result = _compute(
                    region, row, kind, function, args, kwargs, by_keras
                )
            raw_data.see_operation(
                region, name, kind == "product", (args, kwargs), result
            )
            return result

    return replacement


def suspended(function: Callable) -> Callable:
    """What stands in the place of a function that is to run without us."""

    @functools.wraps(function)
    def replacement(*args, **kwargs):
        if regions.active() is None:
            return function(*args, **kwargs)
        if function.__name__ in tensorflow_internals.CUSTOM_GRADIENT_CALLS:
            # The gradient was written for operands of one dtype.
            args, kwargs = as_meant((args, kwargs))
        with regions.within(None):
            return function(*args, **kwargs)

    return replacement


def cast_of_keras(name: str, function: Callable) -> Callable:
    """A cast in Keras's own code: of a layer's inputs, or within its `call`.

    The first names a dtype, that of a policy. The second says that of a tensor.
    """
    within_call = operation(name, function, by_keras=True)
    at_the_door = suspended(function)
    position = _dtype_position(function)

    @functools.wraps(function)
    def replacement(*args, **kwargs):
        dtype, _ = _wanted_dtype(args, kwargs, position)
        if isinstance(dtype, tf.DType):
            return within_call(*args, **kwargs)
        result = at_the_door(*args, **kwargs)
        if args and regions.active() is not None:
            mark_rounded(args[0], result)
        raw_data.see_cast(regions.current(), (args, kwargs), result)
        return result

    return replacement


def traced(function: Callable) -> Callable:
    """A call of a `tf.function`, whose trace may be for one dtype."""

    @functools.wraps(function)
    def replacement(*args, **kwargs):
        if regions.active() is None:
            return function(*args, **kwargs)
        args, kwargs = as_meant((args, kwargs))
        return function(*args, **kwargs)

    return replacement


def stored(function: Callable) -> Callable:
    """A method that stores tensors in what has one dtype, as a variable."""

    @functools.wraps(function)
    def replacement(self, *args, **kwargs):
        if regions.active() is None:
            return function(self, *args, **kwargs)
        with regions.within(None):
            if dtype_name(self.dtype) in DTYPES_16:
                args, kwargs = as_meant((args, kwargs))
            return function(self, *args, **kwargs)

    return replacement


def layer_call(function: Callable) -> Callable:
    """A layer inside a kept one: its results have their dtypes at its end."""

    @functools.wraps(function)
    def replacement(self, *args, **kwargs):
        region = regions.current()
        if region is None:
            return function(self, *args, **kwargs)
        if region.is_step:
            with regions.within(None):
                return function(self, *args, **kwargs)
        is_left = (
            region.kinds is None
            or self.compute_dtype not in DTYPES_16
            or self.quantization_mode is not None
            or getattr(self, "_tfamp_is_left", False)
        )
        inner = dataclasses.replace(
            region,
            layer=self,
            noted=region.noted_of(self),
            dtype=None if is_left else self.compute_dtype,
            is_float32=False,
        )
        # A float32 layer may hand on what it was given.
        ended = as_meant if self.compute_dtype in DTYPES_16 else as_it_is
        with regions.within(inner):
            try:
                result = ended(function(self, *args, **kwargs))
            except Exception:
                seen = region.seen
                if seen is not None and seen.failed is None:
                    seen.failed = region.noted_of(self)
                raise
        return raw_data.see_call(region, self, (args, kwargs), result)

    return replacement


def _dtype_position(function: Callable) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:
        return None
    return names.index("dtype") if "dtype" in names else None


def _wanted_dtype(args, kwargs, position: int | None) -> tuple[Any, bool]:
    """What is asked for, None for nothing, and whether by its position."""
    wanted = kwargs.get("dtype")
    if wanted is None and position is not None and len(args) > position:
        return args[position], True
    return wanted, False


def _kind(region: Region, name: str, args, kwargs, is_reflected) -> str | None:
    if region.kinds is None or region.dtype is None:
        return None
    kind = region.kinds.get(name)
    if kind == "product" and not region.is_float32:
        return _KINDS[contractions.kind(name, args, kwargs, is_reflected)]
    if name in ("divide", "true_divide") and kind == "float32":
        operands = [*args, *kwargs.values()]
        if len(operands) > 1 and not is_reflected:
            divisor = operands[1]
            if isinstance(divisor, (int, float)) and _is_held(
                divisor, region.dtype
            ):
                return None
    return kind


def _is_held(number: float, dtype: str) -> bool:
    return FORMATS[dtype].min_normal <= abs(number) <= FORMATS[dtype].max


def _compute(region, name, kind, function, args, kwargs, by_keras):
    dtypes = meant_dtypes((args, kwargs), by_keras)
    is_meant = bool(dtypes) and dtypes <= {region.dtype}
    is_float32 = has_float32((args, kwargs))
    if "float32" in dtypes and any(map(is_rounded, leaves_of((args, kwargs)))):
        # Keras takes it back to float32, which its code means to have.
        region.note("cast")
    if kind == "product" and is_meant:
        if is_float32:
            args, kwargs = as_meant((args, kwargs))
    elif kind == "float32" or (is_float32 and dtypes & set(DTYPES_16)):
        if kind == "float32" and (is_meant or has_16_bits((args, kwargs))):
            region.note(name)
        args, kwargs = mapped((args, kwargs), float32_value)
        kwargs = _asked_in_float32(kwargs)
    result = function(*args, **kwargs)
    if is_meant:
        mark(result, region.dtype)
    if kind is None and args and is_rounded(args[0]):
        # What only moves numbers, as a slice.
        mark_rounded(args[0], result)
    return result


def _compute_wide(region, kind, function, args, kwargs):
    """A product of 16 bits in a layer that is float32; all else in float32."""
    if kind == "product":

        def narrow(value):
            value = float32_value(value)
            is_float32 = (
                tf.is_tensor(value) and dtype_name(value.dtype) == "float32"
            )
            return tf.cast(value, region.dtype) if is_float32 else value

        args, kwargs = mapped((args, kwargs), narrow)
        return mapped(function(*args, **kwargs), float32_value)
    if has_float32((args, kwargs)) and has_16_bits((args, kwargs)):
        args, kwargs = mapped((args, kwargs), float32_value)
    return function(*args, **kwargs)


def _make(region, row, function, args, kwargs, position, by_keras):
    """A cast, or numbers from nothing, in float32 where 16 bits are wanted."""
    wanted, is_positional = _wanted_dtype(args, kwargs, position)
    name = dtype_name(wanted)
    source = args[0] if args else next(iter(kwargs.values()), None)
    if name in DTYPES_16:
        if dtype_name(getattr(source, "dtype", None)) == name:
            return function(*args, **kwargs)
        if meant_dtype(source) == name:
            return source
        if row in SEQUENCES:
            # Which rounded are others, and collide.
            region.note(row)
        if is_positional:
            args = (*args[:position], "float32", *args[position + 1 :])
        else:
            kwargs = {**kwargs, "dtype": "float32"}
        result = function(*args, **kwargs)
        return meant(result, name) if tf.is_tensor(result) else result
    if name is not None and "int" in name and has_16_bits([source]):
        # Ids, which rounded are others.
        region.note("cast")
    if name == "float32" and is_rounded(source):
        # Its code means to have it in float32, as it came.
        region.note("cast")
    result = function(*args, **kwargs)
    if not tf.is_tensor(result) or wanted is None:
        return result
    if result is source:
        result = tf.identity(result)
    # `cast(mask, scores.dtype)` means the dtype of the scores, 16 bits, and
    # `cast(x, "float32")` means float32. A step may mean that of its data.
    is_of_tensor = by_keras and isinstance(wanted, tf.DType)
    if is_of_tensor and name == "float32" and not region.is_step:
        mark(result, region.dtype)
    return result


def _asked_in_float32(kwargs: dict) -> dict:
    if dtype_name(kwargs.get("dtype")) in DTYPES_16:
        return {**kwargs, "dtype": "float32"}
    return kwargs
