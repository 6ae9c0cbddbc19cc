"""The largest batch that fits: doubled until one does not, then in between."""

import dataclasses
from collections.abc import Callable

# The search ends when what does not fit is larger by this share at most.
_TOLERANCE = 1 / 16
# Where nothing fails, memory is not what limits the batch.
_MOST_ROWS = 2**20


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """What a search found.

    Attributes:
        rows: the largest batch that was tried and fits; 0 if none does.
        fails: the smallest one that was tried and does not; None where all
            that were tried fit.
    """

    rows: int
    fails: int | None


def search(
    fits: Callable[[int], bool], start: int, multiple: int = 1
) -> LargestBatch:
    """Finds the largest batch that fits, to a sixteenth.

    Args:
        fits: tries a batch of so many rows.
        start: to begin with.
        multiple: batches are multiples of it, such as the number of replicas.
    """
    rows = max(start // multiple, 1) * multiple
    fails = None
    while not fits(rows):
        fails = rows
        if rows == multiple:
            return LargestBatch(0, fails)
        rows = max(rows // 2 // multiple, 1) * multiple
    largest = rows
    while fails is None and largest < _MOST_ROWS:
        if fits(2 * largest):
            largest *= 2
        else:
            fails = 2 * largest
    while fails is not None and _is_wide(largest, fails, multiple):
        rows = (largest + fails) // 2 // multiple * multiple
        if fits(rows):
            largest = rows
        else:
            fails = rows
    return LargestBatch(largest, fails)


def _is_wide(fits: int, fails: int, multiple: int) -> bool:
    return fails - fits > max(multiple, fits * _TOLERANCE)
