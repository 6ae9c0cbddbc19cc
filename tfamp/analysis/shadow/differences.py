"""What an operation of 16 bits made other than float32 does."""

import dataclasses

import numpy as np

from tfamp.formats import FORMATS

# So many roundings of one number are no rounding any more.
_ROUNDINGS = 16
# Comparisons with a neighbour may fall to either side.
_TIES = 0.02

# From the gravest on.
NAN = "NaN"
INFINITE = "infinite"
DISCRETE = "discrete"
ZERO = "zero"
ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a result differs from the same in float32.

    Attributes:
        kind: "NaN" and "infinite" of what is finite in float32, "discrete"
            of indices and truth values, "zero" where most of it was lost to
            0, "error" else.
        size: of the first three the share of the elements; of the others the
            error's root mean square by that of the result.
    """

    kind: str
    size: float

    @property
    def weight(self) -> float:
        """What differences are ordered by."""
        if self.kind in (NAN, INFINITE):
            return 3.0
        if self.kind == DISCRETE:
            return 2.0 + self.size
        return min(self.size, 2.0)


def difference(narrow: np.ndarray, wide: np.ndarray) -> Difference | None:
    """Compares a result with the same in float32; None where they agree.

    Args:
        narrow: floats already cast to float32, or integers or truth values.
        wide: of the same shape.
    """
    if narrow.shape != wide.shape:
        return Difference(DISCRETE, 1.0)
    if wide.size == 0:
        return None
    if not np.issubdtype(wide.dtype, np.floating):
        share = float(np.mean(narrow != wide))
        return Difference(DISCRETE, share) if share else None
    is_finite = np.isfinite(wide)
    lost = is_finite & ~np.isfinite(narrow)
    if lost.any():
        kind = NAN if np.isnan(narrow[lost]).any() else INFINITE
        return Difference(kind, float(lost.mean()))
    both = is_finite & np.isfinite(narrow)
    narrow, wide = narrow[both].astype("float64"), wide[both].astype("float64")
    error, size = _norm(narrow - wide), _norm(wide)
    if error == 0.0:
        return None
    if size == 0.0:
        return Difference(ERROR, float("inf"))
    zeroed = _norm(wide[(narrow == 0) & (wide != 0)])
    kind = ZERO if zeroed > 0.7 * error else ERROR
    return Difference(kind, error / size)


def is_beyond_rounding(difference: Difference, dtype: str) -> bool:
    """Whether it is more than the rounding of numbers of 16 bits.

    Args:
        difference: of a result.
        dtype: "float16" or "bfloat16".
    """
    if difference.kind in (NAN, INFINITE):
        return True
    if difference.kind == DISCRETE:
        return difference.size > _TIES
    return difference.size > _ROUNDINGS * FORMATS[dtype].epsilon


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(values))))
