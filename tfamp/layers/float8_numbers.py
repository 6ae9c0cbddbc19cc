"""Numbers of 8 bits with a scale for a whole tensor, in float32 arithmetic.

A tensor times its scale fills the range of the format, is rounded to 8 bits
once, and is divided by the scale again. What follows computes with the result
in 16 or 32 bits; XLA for GPUs turns a product of two such tensors into one of
8 bits. (Micikevicius et al., 2022, "FP8 Formats for Deep Learning".)
"""

import ml_dtypes
import tensorflow as tf

from tfamp import tensorflow_internals

# For inputs and kernels, which need precision; for gradients, which need range.
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
LARGEST = {
    name: float(ml_dtypes.finfo(getattr(ml_dtypes, name)).max)
    for name in (E4M3, E5M2)
}

# Of float32.
_MANTISSA_BITS, _BIAS = 23, 127
_EXPONENT_MASK = 0xFF << _MANTISSA_BITS
# Scales and their reciprocals are normal numbers.
_LARGEST_EXPONENT = 126


def amax_of(x: tf.Tensor) -> tf.Tensor:
    """The largest magnitude in a tensor: a float32 scalar; of none, 0."""
    largest = tf.cast(tf.reduce_max(tf.abs(x)), tf.float32)
    # Of no rows TensorFlow says -inf.
    return tf.maximum(largest, 0.0)


def scale_of(
    amax: tf.Tensor, format_name: str, margin: int, power_of_two: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """The scale that brings a magnitude to the largest number of a format.

    Args:
        amax: float32 scalar, of the tensor, or of the steps before.
        format_name: `E4M3` or `E5M2`.
        margin: this many powers of two stay free for what is larger.
        power_of_two: rounds the scale down to one, so that multiplying and
            dividing by it round nothing.

    Returns:
        The scale and its reciprocal, float32; 1 where the magnitude is 0 or
        not finite.
    """
    known = tf.logical_and(amax > 0, tf.math.is_finite(amax))
    amax = tf.where(known, amax, 1.0)
    if not power_of_two:
        bound = 2.0**_LARGEST_EXPONENT
        scale = tf.clip_by_value(
            LARGEST[format_name] / amax * 2.0**-margin, 1 / bound, bound
        )
        scale = tf.where(known, scale, 1.0)
        return scale, 1.0 / scale
    # Both largest numbers are 1.75 * 2**k: by the bits of the magnitude, since
    # exp and log are not exact.
    bits = tf.bitcast(amax, tf.int32)
    exponent = tf.bitwise.right_shift(bits, _MANTISSA_BITS) - _BIAS
    fraction = tf.bitwise.bitwise_and(bits, (1 << _MANTISSA_BITS) - 1)
    beyond = tf.cast(fraction > 3 << (_MANTISSA_BITS - 2), tf.int32)
    power = _exponent_of(format_name) - margin - exponent - beyond
    power = tf.clip_by_value(power, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    power = tf.where(known, power, 0)
    return _power_of_two(power), _power_of_two(-power)


def to_float8(x: tf.Tensor, scale: tf.Tensor, format_name: str) -> tf.Tensor:
    """A tensor times its scale, rounded once to 8 bits.

    Finite numbers beyond the largest become it. What is not finite stays so
    (NaN, in E4M3, which has no infinity), for the step to be skipped.
    """
    largest = LARGEST[format_name]
    scaled = tf.cast(x, tf.float32) * scale
    saturated = tf.clip_by_value(scaled, -largest, largest)
    rounded = tf.where(tf.math.is_finite(scaled), saturated, scaled)
    return tf.cast(rounded, format_name)


def from_float8(
    quantized: tf.Tensor, reciprocal: tf.Tensor, dtype: tf.DType | str
) -> tf.Tensor:
    """8 bits divided by their scale, in that dtype.

    Exact for powers of two in bfloat16 and float32. XLA knows this product of
    a conversion and a scalar as what a matrix product of 8 bits can do itself.
    """
    return tf.cast(quantized, dtype) * tf.cast(reciprocal, dtype)


def quantize_dequantize(
    x: tf.Tensor,
    scale: tf.Tensor,
    reciprocal: tf.Tensor,
    format_name: str,
    dtype: tf.DType | str,
) -> tf.Tensor:
    """A tensor as 8 bits hold it, in that dtype.

    XLA gets the conversions to 8 bits and back that it knows. Elsewhere the
    same bits are made in float32: TensorFlow's kernels convert one number after
    the other, in twice the time, and its optimizer gives up on a graph with an
    E5M2 tensor in it.
    """
    if tensorflow_internals.is_compiled_by_xla():
        quantized = to_float8(x, scale, format_name)
        return from_float8(quantized, reciprocal, dtype)
    rounded = _rounded(tf.cast(x, tf.float32) * scale, format_name)
    return tf.cast(rounded * reciprocal, dtype)


def _rounded(scaled: tf.Tensor, format_name: str) -> tf.Tensor:
    """As `to_float8` rounds, in float32; few passes, all of them vectorized."""
    largest = LARGEST[format_name]
    info = ml_dtypes.finfo(getattr(ml_dtypes, format_name))
    saturated = tf.clip_by_value(scaled, -largest, largest)
    bits = tf.bitcast(saturated, tf.int32)
    # The power of two below each number; subnormal numbers have the distance
    # of the smallest normal ones.
    power = tf.maximum(
        tf.bitwise.bitwise_and(bits, _EXPONENT_MASK),
        (_BIAS + int(info.minexp)) << _MANTISSA_BITS,
    )
    # float32 numbers of the size of 1.5 times this many of them are as far
    # from each other as the 8-bit ones, so that adding one rounds.
    missing = _MANTISSA_BITS - int(info.nmant)
    large = tf.bitcast(
        power + ((missing << _MANTISSA_BITS) | (1 << (_MANTISSA_BITS - 1))),
        tf.float32,
    )
    rounded = tf.bitcast((saturated + large) - large, tf.int32)
    # 0 with the sign of the number, as 8 bits have it, or NaN.
    rest = tf.bitcast(scaled * 0.0, tf.int32)
    return tf.bitcast(tf.bitwise.bitwise_or(rounded, rest), tf.float32)


def _exponent_of(format_name: str) -> int:
    return {E4M3: 8, E5M2: 15}[format_name]


def _power_of_two(exponent: tf.Tensor) -> tf.Tensor:
    """2**exponent, of an int32 scalar, by its bits."""
    bits = tf.bitwise.left_shift(exponent + _BIAS, _MANTISSA_BITS)
    return tf.bitcast(bits, tf.float32)
