"""The format table, and what values become in each format."""

import math
import subprocess
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tfamp import formats
from tfamp.formats import FORMATS, convert, convert_scaled

NAMES = list(FORMATS)
NARROW = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def every_finite_value(name):
    """All finite values of a format of at most 16 bits, ascending."""
    bits = FORMATS[name].bits
    patterns = np.arange(2**bits, dtype=f"uint{bits}")
    with np.errstate(invalid="ignore"):  # Signaling nan patterns.
        values = patterns.view(dtype_of(name)).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize(
    ("name", "bits", "exponent", "mantissa", "largest", "normal", "subnormal"),
    [
        # (2 - 2**-mantissa) * 2**bias; 2**(1 - bias); 2**(1 - bias - mantissa)
        ("float32", 32, 8, 23, (2 - 2**-23) * 2.0**127, -126, -149),
        ("float16", 16, 5, 10, 65504, -14, -24),
        ("bfloat16", 16, 8, 7, (2 - 2**-7) * 2.0**127, -126, -133),
        ("float8_e4m3fn", 8, 4, 3, 448, -6, -9),
        ("float8_e5m2", 8, 5, 2, 57344, -14, -16),
    ],
)
def test_the_table_holds_the_published_figures(
    name, bits, exponent, mantissa, largest, normal, subnormal
):
    assert FORMATS[name] == formats.Format(
        name=name,
        bits=bits,
        exponent_bits=exponent,
        mantissa_bits=mantissa,
        max=largest,
        min_normal=2.0**normal,
        min_subnormal=2.0**subnormal,
        epsilon=2.0**-mantissa,
    )


def test_the_table_agrees_with_an_enumeration_of_all_values():
    for name in NARROW:
        values = every_finite_value(name)
        assert FORMATS[name].max == values[-1]
        assert FORMATS[name].min_subnormal == values[values > 0][0]
        assert FORMATS[name].epsilon == values[values > 1][0] - 1


@pytest.mark.parametrize(
    ("name", "value", "result", "kind"),
    [
        ("float16", 1.5, 1.5, "exact"),
        ("float16", 0.0, 0.0, "exact"),
        ("float16", 2049.0, 2048.0, "rounded"),
        ("float16", 2051.0, 2052.0, "rounded"),
        ("float16", 2.0**-24, 2.0**-24, "subnormal"),
        ("float16", 3e-8, 2.0**-24, "subnormal"),
        ("float16", 2.0**-25, 0.0, "zero"),
        ("float16", 1e-8, 0.0, "zero"),
        ("float16", 65519.0, 65504.0, "rounded"),
        ("float16", 65520.0, math.inf, "overflow"),
        ("float16", -70000.0, -math.inf, "overflow"),
        ("bfloat16", 70000.0, 70144.0, "rounded"),
        ("bfloat16", 3.4e38, math.inf, "overflow"),
        ("float8_e4m3fn", 464.0, 448.0, "rounded"),
        ("float8_e5m2", 61440.0, math.inf, "overflow"),
        ("float8_e5m2", math.inf, math.inf, "exact"),
        ("float32", 0.1, float(np.float32(0.1)), "rounded"),
        ("float32", 1e300, math.inf, "overflow"),
        ("float32", 1.7976931348623157e308, math.inf, "overflow"),
        ("float32", 5e-324, 0.0, "zero"),
    ],
)
def test_a_value_becomes_what_hand_arithmetic_says(name, value, result, kind):
    conversion = convert(value, FORMATS[name])
    assert conversion.result == result
    assert conversion.kind == kind


def test_e4m3fn_has_no_inf_and_overflows_to_nan():
    for value in (465.0, -465.0, math.inf):
        conversion = convert(value, FORMATS["float8_e4m3fn"])
        assert math.isnan(conversion.result)
        assert conversion.kind == "overflow"
        assert conversion.relative_error == math.inf


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_nan_and_the_sign_of_zero_stays(name):
    assert math.isnan(convert(math.nan, FORMATS[name]).result)
    assert convert(math.nan, FORMATS[name]).kind == "exact"
    for value in (-0.0, -5e-324):
        flushed = convert(value, FORMATS[name]).result
        assert flushed == 0
        assert math.copysign(1, flushed) == -1


@pytest.mark.parametrize("name", NARROW)
def test_a_float32_becomes_what_ml_dtypes_makes_of_it(name):
    # From float32 the cast of ml_dtypes rounds once, so it is an oracle here:
    # all values of the format, the ties between them, and their neighbours.
    values = every_finite_value(name)
    ties = (values[1:] + values[:-1]) / 2
    probes = np.concatenate([values, ties, [2.0**16, 480, 2.0**-30]])
    probes = probes[:: max(1, len(probes) // 4000)].astype(np.float32)
    around = np.concatenate(
        [probes, np.nextafter(probes, np.float32(np.inf)), -probes]
    )
    expected = around.astype(dtype_of(name)).astype(np.float64)
    actual = [convert(value, FORMATS[name]).result for value in around]
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", NARROW)
def test_a_float64_is_rounded_once_to_the_nearest_value(name):
    # A hair from a tie: closer than float32 can tell, so that a cast through
    # float32 sees a tie and goes to the even neighbour instead.
    values = every_finite_value(name)
    start = np.searchsorted(values, 1.0)
    for lower, upper in zip(values[start:], values[start + 1 :], strict=False):
        if lower >= 2.0:
            break
        tie = (lower + upper) / 2
        for probe in (tie * (1 - 2.0**-40), tie * (1 + 2.0**-40)):
            nearest = min(
                (lower, upper),
                key=lambda v, p=probe: abs(Fraction(v) - Fraction(p)),
            )
            assert convert(probe, FORMATS[name]).result == nearest


def test_a_cast_by_ml_dtypes_rounds_twice_where_convert_does_not():
    value = 1 + 2**-8 + 2**-40
    assert float(np.float64(value).astype(ml_dtypes.bfloat16)) == 1.0
    assert convert(value, FORMATS["bfloat16"]).result == 1 + 2**-7


@pytest.mark.parametrize("name", NARROW)
def test_the_spacing_is_the_distance_of_neighbours(name):
    values = every_finite_value(name)
    values = values[values >= 0]
    gaps = np.diff(values)
    for place in (values[:-1], values[:-1] + gaps / 2, -values[:-1]):
        actual = [formats.spacing(value, FORMATS[name]) for value in place]
        np.testing.assert_array_equal(actual, gaps)
    assert math.isnan(formats.spacing(math.inf, FORMATS[name]))


def test_the_relative_error_is_of_the_value_that_went_in():
    assert convert(2049.0, FORMATS["float16"]).relative_error == 1 / 2049
    assert convert(1e-8, FORMATS["float16"]).relative_error == 1
    assert convert(7e4, FORMATS["float16"]).relative_error == math.inf
    assert convert(0.5, FORMATS["float16"]).relative_error == 0


def test_scaling_brings_back_a_gradient_that_float16_flushes_to_zero():
    gradient = 2.0**-30
    assert convert(gradient, FORMATS["float16"]).kind == "zero"
    scaled = convert_scaled(gradient, FORMATS["float16"], 65536.0)
    assert scaled.scaled.result == 2.0**-14
    assert scaled.result == gradient
    assert scaled.kind == "exact"
    assert scaled.relative_error == 0


def test_scaling_overflows_a_value_that_fits_unscaled():
    scaled = convert_scaled(2.0, FORMATS["float16"], 65536.0)
    assert scaled.scaled.result == math.inf
    assert scaled.result == math.inf
    assert scaled.kind == "overflow"


def test_unscaling_in_float32_can_lose_what_the_format_held():
    scaled = convert_scaled(1e-46, FORMATS["bfloat16"], 2.0**24)
    assert scaled.scaled.kind == "subnormal"
    assert scaled.result == 0
    assert scaled.kind == "zero"
    small = convert_scaled(1.5 * 2.0**-149, FORMATS["bfloat16"], 2.0**24)
    assert small.scaled.kind == "exact"
    assert (small.result, small.kind) == (2.0**-148, "subnormal")
    large = convert_scaled(2.0**130, FORMATS["bfloat16"], 2.0**-8)
    assert large.scaled.kind == "exact"
    assert large.kind == "overflow"


def test_a_product_beyond_float64_is_still_an_overflow_or_a_zero():
    for value, scale, kind in [
        (1e308, 2.0**100, "overflow"),
        (-1e308, 2.0**100, "overflow"),
        (5e-324, 2.0**-100, "zero"),
    ]:
        scaled = convert_scaled(value, FORMATS["bfloat16"], scale)
        assert scaled.kind == kind
        assert math.copysign(1, scaled.result) == math.copysign(1, value)


@pytest.mark.parametrize(
    "scale", [0.0, -2.0, 3.0, 65537.0, math.inf, math.nan, 2.0**128, 2.0**-127]
)
def test_a_scale_that_is_no_power_of_two_is_refused(scale):
    with pytest.raises(ValueError, match=r"positive power of two") as error:
        convert_scaled(1.0, FORMATS["float16"], scale)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [2.0**-126, 0.5, 1.0, 2.0**127])
def test_every_power_of_two_that_float32_holds_is_a_scale(scale):
    formats.check_scale(scale)


def test_the_module_needs_neither_keras_nor_tensorflow():
    code = (
        "import sys, tfamp.formats\n"
        "print(sorted({'keras', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
