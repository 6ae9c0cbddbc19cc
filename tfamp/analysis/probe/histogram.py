"""Exponent histograms: how many values lie at which power of two.

Counting runs on the device that holds the values, on the bits of the float32.
A value's power of two is not enough to say what a 16-bit format makes of it:
65504 and 65520 share one, and float16 holds only the first. So each power of
two has a few cells, cut where the formats cut (`CELL_BEGINS`).
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from tfamp.formats import FORMATS

if TYPE_CHECKING:
    import tensorflow as tf

# What the histograms can tell the fate of.
FORMAT_NAMES = ("float16", "bfloat16")
# Of these, what is lost at the small end; their largest numbers are no powers
# of two less one spacing, and would need cells of their own.
FLOAT8_NAMES = ("float8_e4m3fn", "float8_e5m2")

MANTISSA_BITS = FORMATS["float32"].mantissa_bits
_EXPONENTS = 2 ** FORMATS["float32"].exponent_bits
_BIAS = _EXPONENTS // 2 - 1
MIN_EXPONENT, MAX_EXPONENT = 1 - _BIAS, _BIAS

# `count` tells apart how far a mantissa lies below the next power of two, by
# the leading bit of that distance: 24 codes, in 5 bits.
_CODE_BITS = 5
_CODES = 2**_CODE_BITS
BINS = _EXPONENTS * _CODES


def _code_edges() -> tuple[int, ...]:
    # A format with m mantissa bits rounds up to the next power of two from
    # half a spacing below it: its largest numbers to inf. The largest
    # subnormals have one bit less, and round up to the smallest normal.
    edges = set()
    for name in (*FORMAT_NAMES, *FLOAT8_NAMES):
        below = MANTISSA_BITS - FORMATS[name].mantissa_bits
        edges |= {below - 1, below}
    return (0, *sorted(edges), MANTISSA_BITS, MANTISSA_BITS + 1)


_CODE_EDGES = _code_edges()

# The mantissa, of 0 to 2**23 - 1, at which each cell of a power of two begins.
# The first cell holds the power itself alone.
CELL_BEGINS = (
    0,
    1,
    *(2**MANTISSA_BITS - 2**edge for edge in reversed(_CODE_EDGES[1:-2])),
)


def count(values: "tf.Tensor") -> "tf.Tensor":
    """Counts the values of a tensor in graph or eagerly, on its device.

    Bit operations, casts and a product, but no sum or comparison of int32:
    TensorFlow computes those on the host even where the tensor is on a GPU.

    Args:
        values: float32, of any shape.

    Returns:
        int64 [BINS], to be added up and given to `from_bins`.
    """
    import tensorflow as tf

    bits = tf.bitcast(tf.reshape(values, [-1]), tf.int32)
    distance = tf.cast(
        tf.bitwise.bitwise_and(tf.bitwise.invert(bits), 2**MANTISSA_BITS - 1),
        tf.float32,
    )
    # The distance of a power of two itself is 2**23 - 1. The factor's last
    # bit lifts it, and nothing else, to the next leading bit; the 2 makes the
    # codes begin at 0.
    factor = np.float32(2) + np.float32(2 ** (1 - MANTISSA_BITS))
    code = tf.bitwise.bitwise_and(
        tf.bitwise.right_shift(
            tf.bitcast(distance * factor, tf.int32), MANTISSA_BITS
        ),
        _CODES - 1,
    )
    exponent = tf.bitwise.bitwise_and(
        tf.bitwise.right_shift(bits, MANTISSA_BITS - _CODE_BITS),
        (_EXPONENTS - 1) * _CODES,
    )
    counts = tf.raw_ops.DenseBincount(
        input=tf.bitwise.bitwise_or(exponent, code),
        size=BINS,
        weights=tf.zeros([0], tf.int32),
    )
    return tf.cast(counts, tf.int64)


def from_bins(bins: np.ndarray) -> "Histogram":
    """The histogram of what `count` counted.

    Args:
        bins: integers [BINS].
    """
    codes = np.asarray(bins, np.int64).reshape(_EXPONENTS, _CODES)
    cells = np.add.reduceat(codes, _CODE_EDGES[:-1], axis=1)
    # Codes rise towards the power of two that lies below.
    return Histogram(cells[:, ::-1])


def of_array(values: np.ndarray) -> "Histogram":
    """The histogram of an array in memory, by NumPy alone."""
    bits = np.asarray(values, np.float32).ravel().view(np.int32)
    exponent = (bits >> MANTISSA_BITS) & (_EXPONENTS - 1)
    mantissa = bits & (2**MANTISSA_BITS - 1)
    cell = np.searchsorted(CELL_BEGINS, mantissa, side="right") - 1
    cells = np.zeros([_EXPONENTS, len(CELL_BEGINS)], np.int64)
    np.add.at(cells, (exponent, cell), 1)
    return Histogram(cells)


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """How many values lie where.

    Attributes:
        cells: int64 [256, len(CELL_BEGINS)], by biased exponent and cell.
    """

    cells: np.ndarray

    @property
    def values(self) -> int:
        """All of them."""
        return int(self.cells.sum())

    @property
    def zeros(self) -> int:
        """Exact zeros, of either sign."""
        return int(self.cells[0, 0])

    @property
    def tiny(self) -> int:
        """Subnormals of float32, which TensorFlow's kernels take for zero."""
        return int(self.cells[0, 1:].sum())

    @property
    def infinite(self) -> int:
        """Infinities, of either sign."""
        return int(self.cells[-1, 0])

    @property
    def nan(self) -> int:
        """Those that are not a number."""
        return int(self.cells[-1, 1:].sum())

    @functools.cached_property
    def normal_cells(self) -> np.ndarray:
        """int64 [254, cells]: the normal numbers, from 2**MIN_EXPONENT on."""
        return self.cells[1:-1]

    @functools.cached_property
    def by_exponent(self) -> np.ndarray:
        """int64 [254]: values of 2**e to 2**(e + 1), from MIN_EXPONENT on."""
        return self.normal_cells.sum(axis=1)

    @property
    def measured(self) -> int:
        """Values that are finite and not zero: what can be lost."""
        return int(self.normal_cells.sum()) + self.tiny

    def __add__(self, other: "Histogram") -> "Histogram":
        return Histogram(self.cells + other.cells)
