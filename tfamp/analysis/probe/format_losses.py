"""What a format makes of the values in a histogram, at each loss scale.

Where a format rounds to zero, to a subnormal or to inf is asked of
`tfamp.formats`, value by value; no bound is written here.
"""

import dataclasses
import functools
import math

import numpy as np

from tfamp.analysis.probe.histogram import (
    CELL_BEGINS,
    MANTISSA_BITS,
    MAX_EXPONENT,
    MIN_EXPONENT,
    Histogram,
)
from tfamp.formats import FORMATS, check_scale, convert

# The loss scales that are looked at: from none to what `LossScaleOptimizer`
# allows at most.
SCALE_EXPONENTS = tuple(range(25))
SCALES = tuple(2.0**exponent for exponent in SCALE_EXPONENTS)

# In the order of `Shares`.
_FATES = {
    "zero": 0,
    "subnormal": 1,
    "exact": 2,
    "rounded": 2,
    "overflow": 3,
}


_FLOAT8_END = 0.75


@dataclasses.dataclass(frozen=True)
class Shares:
    """What becomes of the values that are finite and not zero.

    All shares are 0 where there is no such value.

    Attributes:
        zero: flushed to zero.
        subnormal: kept with fewer bits, the fewer the smaller they are.
        normal: kept with all bits of the format.
        overflow: become inf.
    """

    zero: float
    subnormal: float
    normal: float
    overflow: float


def shares(histogram: Histogram, format_name: str, scale: float) -> Shares:
    """What becomes of the values, multiplied by a scale, in a format.

    Exact, ties included, but for subnormals of float32: those count as
    flushed, since TensorFlow's kernels take them for zero in every format.

    Args:
        histogram: of the values before scaling.
        format_name: one of `histogram.FORMAT_NAMES`.
        scale: a power of two.

    Raises:
        ValueError: the scale is no power of two.
    """
    check_scale(scale)
    exponent = math.frexp(scale)[1] - 1
    return Shares(*map(float, _shares(histogram, format_name, [exponent])[0]))


def shares_by_scale(histogram: Histogram, format_name: str) -> np.ndarray:
    """float64 [25, 4]: the fields of `Shares`, at each of `SCALES`."""
    return _shares(histogram, format_name, SCALE_EXPONENTS)


def overflows(
    histogram: Histogram, format_name: str, headroom: int
) -> np.ndarray:
    """bool [25]: whether a value overflows, at each of `SCALES`.

    Args:
        histogram: of the values before scaling.
        format_name: one of `histogram.FORMAT_NAMES`.
        headroom: powers of two by which values may yet grow.
    """
    exponents = [exponent + headroom for exponent in SCALE_EXPONENTS]
    return _counts(histogram, format_name, exponents)[:, 3] > 0


def float8_shares(
    histogram: Histogram, format_name: str
) -> tuple[float, Shares]:
    """What 8 bits lose of a tensor at the scale that `tfamp.float8` gives it.

    Args:
        histogram: of the values.
        format_name: one of `histogram.FLOAT8_NAMES`.

    Returns:
        The scale: the largest power of two at which the largest value is no
        larger than that of the format; below it by 2 where the histogram
        cannot tell. And the shares; none overflows.
    """
    exponents, cells = np.nonzero(histogram.normal_cells)
    if not exponents.size:
        return 1.0, Shares(0.0, 0.0, 0.0, 0.0)
    top = exponents.max()
    begin = CELL_BEGINS[cells[exponents == top].max()] / 2**MANTISSA_BITS
    # Both largest numbers are 1.75 times a power of two.
    largest = math.frexp(FORMATS[format_name].max)[1] - 1
    power = largest - (MIN_EXPONENT + int(top)) - int(begin >= _FLOAT8_END)
    row = _shares(histogram, format_name, [power])[0]
    return 2.0**power, Shares(*map(float, row))


def _shares(histogram, format_name, scale_exponents) -> np.ndarray:
    counts = _counts(histogram, format_name, scale_exponents)
    return counts / max(histogram.measured, 1)


def _counts(histogram, format_name, scale_exponents) -> np.ndarray:
    """int64 [scales, 4]: the numbers of values that the shares are of."""
    lowest = min(scale_exponents)
    is_fated = _is_fated(format_name, lowest, max(scale_exponents))
    rows = len(histogram.normal_cells)
    counts = np.stack(
        [
            np.tensordot(is_fated[:, i : i + rows], histogram.normal_cells)
            for i in (exponent - lowest for exponent in scale_exponents)
        ]
    )
    counts[:, _FATES["zero"]] += histogram.tiny
    return counts


@functools.cache
def _is_fated(format_name: str, lowest: int, highest: int) -> np.ndarray:
    """int64 [4, exponents, cells]: 1 where that becomes of a cell's values.

    Args:
        format_name: the format.
        lowest: the exponent of the smallest scale; that of the first row is
            `MIN_EXPONENT + lowest`.
        highest: the exponent of the largest scale.
    """
    target = FORMATS[format_name]
    # All values of a cell have one fate: that of the value it begins with.
    begins = [1.0 + begin / 2**MANTISSA_BITS for begin in CELL_BEGINS]
    fates = np.array(
        [
            [
                _FATES[convert(math.ldexp(begin, exponent), target).kind]
                for begin in begins
            ]
            for exponent in range(
                MIN_EXPONENT + lowest, MAX_EXPONENT + highest + 1
            )
        ]
    )
    return np.stack([fates == fate for fate in range(4)]).astype(np.int64)
