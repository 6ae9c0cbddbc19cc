"""The number formats: their range, their spacing, what a value becomes.

Every figure is computed from `ml_dtypes`; nothing is typed in. This module
imports neither Keras nor TensorFlow.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal, get_args

import ml_dtypes
import numpy as np

_NAMES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")

# In order of what is lost.
Kind = Literal["exact", "rounded", "subnormal", "zero", "overflow"]


@dataclass(frozen=True)
class Format:
    """One binary floating-point format.

    Attributes:
        name: Its name in `ml_dtypes` and Keras.
        bits: Width of one number, sign included.
        exponent_bits: Width of the exponent.
        mantissa_bits: Width of the stored fraction, without the implicit one.
        max: The largest finite value.
        min_normal: The smallest positive value with the full fraction.
        min_subnormal: The smallest positive value.
        epsilon: The spacing of the values from 1 to 2.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    max: float
    min_normal: float
    min_subnormal: float
    epsilon: float


@dataclass(frozen=True)
class Conversion:
    """What a value becomes in a format.

    Attributes:
        format: The name of the format.
        value: The value that went in, a float64.
        result: The value of the format that comes out.
        kind: `exact`; `rounded` to a normal number; `subnormal`, with fewer
            fraction bits the smaller it is; `zero`, flushed from a non-zero
            value; `overflow`, to inf, or to nan in float8_e4m3fn, which has
            no inf. inf and nan that the format holds are `exact`.
        relative_error: `|result - value| / |value|`; 1 for `zero`, inf for
            `overflow`.
    """

    format: str
    value: float
    result: float
    kind: Kind
    relative_error: float


@dataclass(frozen=True)
class ScaledConversion:
    """What a value becomes when it passes through a format scaled.

    This is the way of a gradient under loss scaling: multiplied by the scale,
    held in the format, divided by the scale in float32.

    Attributes:
        scale: The loss scale, a power of two.
        scaled: The conversion of `value * scale` to the format.
        result: The float32 after unscaling.
        kind: As in `Conversion`; the worse of both roundings.
        relative_error: Of `result` against the value that went in.
    """

    scale: float
    scaled: Conversion
    result: float
    kind: Kind
    relative_error: float


def convert(value: float, target: Format) -> Conversion:
    """Rounds a value to a format, ties to even, in one rounding.

    A cast by `ml_dtypes` from float64 to bfloat16 or to a float8 goes through
    float32 and rounds twice: `1 + 2**-8 + 2**-40` then becomes 1 and not
    `1 + 2**-7` in bfloat16. Hardware that rounds once from the exact value
    does not do so, nor does this function.

    Args:
        value: Any float64, also inf and nan.
        target: One of `FORMATS`.

    Returns:
        The result, what happened, and the relative error.
    """
    value = float(value)
    result = _round(value, target)
    return Conversion(
        format=target.name,
        value=value,
        result=result,
        kind=_kind(value, result, target),
        relative_error=_relative_error(value, result),
    )


def convert_scaled(
    value: float, target: Format, scale: float
) -> ScaledConversion:
    """Scales a value, rounds it to a format, unscales it in float32.

    Args:
        value: Any float64, also inf and nan.
        target: One of `FORMATS`.
        scale: A power of two from 2**-126 to 2**127, the range in which a
            float32 holds both it and its reciprocal.

    Returns:
        The scaled conversion, the unscaled float32, and what was lost.

    Raises:
        ValueError: The scale is not such a power of two.
    """
    check_scale(scale)
    value = float(value)
    scaled = convert(_times(value, scale), target)
    unscaled = convert(scaled.result / scale, FORMATS["float32"])
    # Unscaling can lose what the format held: 1e-46 * 2**24 is a
    # bfloat16, but the float32 nearest to 1e-46 is zero.
    return ScaledConversion(
        scale=scale,
        scaled=scaled,
        result=unscaled.result,
        kind=max(scaled.kind, unscaled.kind, key=get_args(Kind).index),
        relative_error=_relative_error(value, unscaled.result),
    )


def spacing(value: float, target: Format) -> float:
    """The distance from one number of a format to the next, at a value.

    It is `epsilon` at 1, doubles at each power of two, and stays
    `min_subnormal` below `min_normal`. A sum moves a number only if what is
    added exceeds half of it.

    Args:
        value: any float64; its sign does not matter.
        target: one of `FORMATS`.

    Returns:
        The distance between the neighbours that the value lies between, the
        wider one where it is a power of two; nan where it is not finite.
        Beyond `max` it goes on as if the format did.
    """
    if not math.isfinite(value):
        return math.nan
    # The exponent e of 2**e <= |value|; below the smallest normal, its own.
    exponent = math.frexp(max(abs(value), target.min_normal))[1] - 1
    return math.ldexp(1.0, exponent - target.mantissa_bits)


def check_scale(scale: float) -> None:
    """Raises ValueError unless `scale` is a power of two that float32 holds.

    Powers of two only: multiplying by another number rounds, so that scaling
    and unscaling would change the gradients.
    """
    in_range = 2.0**-126 <= scale <= 2.0**127
    if not in_range or math.frexp(scale)[0] != 0.5:
        raise ValueError(
            f"scale is {scale:.17g}; expected a positive power of two from "
            "2**-126 to 2**127, such as 65536."
        )


def _from_ml_dtypes(name: str) -> Format:
    info = ml_dtypes.finfo(_dtype(name))
    return Format(
        name=name,
        bits=int(info.bits),
        exponent_bits=int(info.nexp),
        mantissa_bits=int(info.nmant),
        max=float(info.max),
        min_normal=float(info.smallest_normal),
        min_subnormal=float(info.smallest_subnormal),
        epsilon=float(info.eps),
    )


def _dtype(name: str) -> np.dtype:
    # numpy knows float32 and float16 by name; ml_dtypes defines the others.
    return np.dtype(getattr(ml_dtypes, name, name))


def _round(value: float, target: Format) -> float:
    if not math.isfinite(value):
        return _non_finite(value, target)
    # Dividing and multiplying by a power of two is exact, and Python rounds
    # ties to even: this is the only rounding.
    step = spacing(value, target)
    rounded = round(abs(value) / step) * step
    if rounded > target.max:
        return _non_finite(math.copysign(math.inf, value), target)
    return math.copysign(rounded, value)


def _non_finite(value: float, target: Format) -> float:
    return float(np.float32(value).astype(_dtype(target.name)))


def _kind(value: float, result: float, target: Format) -> Kind:
    if math.isnan(value):
        return "exact"
    below_normal = 0 < abs(result) < target.min_normal
    if result == value:
        return "subnormal" if below_normal else "exact"
    if not math.isfinite(result):
        return "overflow"
    if result == 0:
        return "zero"
    return "subnormal" if below_normal else "rounded"


def _relative_error(value: float, result: float) -> float:
    if result == value or math.isnan(value):
        return 0.0
    if not math.isfinite(result):
        return math.inf
    return abs(result - value) / abs(value)


def _times(value: float, scale: float) -> float:
    product = value * scale
    # Where float64 itself over- or underflows, its last finite number stands
    # for the product, so that the format is seen to lose it.
    if math.isinf(product) and math.isfinite(value):
        return math.copysign(sys.float_info.max, value)
    if product == 0 and value != 0:
        return math.copysign(math.ulp(0.0), value)
    return product


FORMATS: dict[str, Format] = {name: _from_ml_dtypes(name) for name in _NAMES}
