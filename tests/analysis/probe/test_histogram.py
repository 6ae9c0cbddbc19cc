"""Histograms count every float32 in its cell, and say what becomes of it."""

import math

import numpy as np
import pytest
import tensorflow as tf

from tfamp.analysis.probe import format_losses, histogram
from tfamp.analysis.probe.histogram import FLOAT8_NAMES, FORMAT_NAMES
from tfamp.formats import FORMATS, convert


def edges_of(exponent):
    """The first and the last float32 of each cell of a power of two."""
    size = 2**histogram.MANTISSA_BITS
    ends = [begin - 1 for begin in (*histogram.CELL_BEGINS[1:], size)]
    mantissas = [*histogram.CELL_BEGINS, *ends]
    return np.ldexp(
        np.array([1 + m / size for m in mantissas]), exponent
    ).astype(np.float32)


def some_of_all_floats():
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, np.uint32)
    edges = [
        edges_of(e)
        for e in range(histogram.MIN_EXPONENT, histogram.MAX_EXPONENT + 1)
    ]
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40], np.float32)
    return np.concatenate([bits.view(np.float32), *edges, special])


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function])
def test_the_device_counts_as_numpy_does(wrap):
    values = some_of_all_floats()
    bins = wrap(histogram.count)(tf.constant(values.reshape(2, -1)))
    counted = histogram.from_bins(bins.numpy())
    np.testing.assert_array_equal(
        counted.cells, histogram.of_array(values).cells
    )
    assert counted.values == values.size


def test_zeros_tiny_values_infinities_and_nans_are_told_apart():
    counted = histogram.of_array(
        [0.0, -0.0, 1e-40, 1.0, 1.5, 2.0, np.inf, -np.inf, -np.inf, np.nan]
    )
    assert (counted.zeros, counted.tiny, counted.infinite, counted.nan) == (
        2,
        1,
        3,
        1,
    )
    # 1e-40, 1, 1.5 and 2.
    assert counted.measured == 4
    at_one = 0 - histogram.MIN_EXPONENT
    assert list(counted.by_exponent[at_one : at_one + 2]) == [2, 1]


def test_histograms_add_up():
    both = histogram.of_array([1.0, 3.0]) + histogram.of_array([1.0])
    assert both.values == 3


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_each_cell_has_one_fate(name):
    """Else a share would be wrong by part of a cell."""
    for exponent in range(-160, 150):
        first_and_last = np.ldexp(
            edges_of(0).astype(np.float64), exponent
        ).reshape(2, -1)
        for first, last in first_and_last.T:
            fates = {
                format_losses._FATES[convert(value, FORMATS[name]).kind]
                for value in (first, last)
            }
            assert len(fates) == 1, (first, last)


@pytest.mark.parametrize(
    ("value", "fate"),
    [
        (2.0**-25, "zero"),
        (-(2.0**-25), "zero"),
        (2.0**-25 * (1 + 2**-23), "subnormal"),
        (2.0**-14 * (1 - 2**-11) - 2.0**-38, "subnormal"),
        (2.0**-14 * (1 - 2**-11), "normal"),
        (2.0**-14, "normal"),
        (65519.99, "normal"),
        (65520.0, "overflow"),
    ],
)
def test_float16_ends_exactly_where_ieee_754_says(value, fate):
    counted = histogram.of_array([value])
    for exponent in (0, 7, 24):
        share = format_losses.shares(
            histogram.of_array([value / 2**exponent]), "float16", 2.0**exponent
        )
        assert getattr(share, fate) == 1.0
    assert counted.measured == 1


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_shares_at_every_scale_are_those_of_casting_each_value(name):
    rng = np.random.default_rng(1)
    values = np.exp2(rng.uniform(-60, 40, 4000)).astype(np.float32)
    found = format_losses.shares_by_scale(histogram.of_array(values), name)
    fmt = FORMATS[name]
    for scale, row in zip(format_losses.SCALES, found, strict=True):
        kinds = [convert(float(value) * scale, fmt).kind for value in values]
        assert row[0] == kinds.count("zero") / 4000
        assert row[1] == kinds.count("subnormal") / 4000
        assert row[3] == kinds.count("overflow") / 4000
        assert math.isclose(row.sum(), 1)


@pytest.mark.parametrize("name", FLOAT8_NAMES)
@pytest.mark.parametrize("largest", [1.0, 1.7, 1.99])
def test_what_8_bits_lose_at_a_tensors_own_scale(name, largest):
    rng = np.random.default_rng(1)
    values = np.exp2(rng.uniform(-60, -20, 2000)).astype(np.float32)
    values[0] = largest * 2.0**-20
    counted = histogram.of_array(values)
    scale, shares = format_losses.float8_shares(counted, name)
    wanted = 2.0 ** np.floor(np.log2(FORMATS[name].max / values.max()))
    assert scale == wanted
    kinds = [
        convert(float(value) * scale, FORMATS[name]).kind for value in values
    ]
    assert shares.zero == kinds.count("zero") / 2000
    assert shares.subnormal == kinds.count("subnormal") / 2000
    assert shares.overflow == 0


def test_values_that_are_zero_or_not_finite_take_no_share():
    share = format_losses.shares(
        histogram.of_array([0.0, np.nan, np.inf, 1e-9, 1.0]), "float16", 1.0
    )
    assert share == format_losses.Shares(0.5, 0.0, 0.5, 0.0)
    nothing = format_losses.shares(histogram.of_array([0.0]), "float16", 1.0)
    assert nothing == format_losses.Shares(0.0, 0.0, 0.0, 0.0)


def test_a_scale_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        format_losses.shares(histogram.of_array([1.0]), "float16", 3.0)
