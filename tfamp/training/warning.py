"""A warning at the line of the user's that it is about."""

import itertools
import pathlib
import sys
import warnings

_PACKAGE = str(pathlib.Path(__file__).parent.parent)


def warn(message: str) -> None:
    """A UserWarning that names the line which called tfamp."""
    for level in itertools.count(1):
        frame = sys._getframe(level)
        is_ours = frame.f_code.co_filename.startswith(_PACKAGE)
        if not is_ours or frame.f_back is None:
            warnings.warn(message, stacklevel=level + 1)
            return
