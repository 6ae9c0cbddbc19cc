"""How many cores there are to compute on."""

import os

from tfamp.errors import InputError


def count_cores(wanted: int) -> int:
    """So many as are wanted, or all for 0.

    Raises:
        InputError: this process may not use so many.
    """
    # Not on macOS and Windows.
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    if wanted > cores:
        raise InputError(
            f"threads={wanted} is more than the {cores} cores that this "
            "process may use."
        )
    return wanted or cores
