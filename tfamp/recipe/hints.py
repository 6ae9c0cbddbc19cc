"""A line under a traceback that comes of a known bug of Keras."""

import sys
import traceback

from tfamp.hardware.known_issues import ADAPT


def add_hint(error: BaseException) -> None:
    """Puts what is known of an error under its traceback."""
    places = {
        (frame.f_code.co_name, frame.f_globals.get("__name__", ""))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    }
    if not any(
        name == "adapt" and module.endswith("preprocessing.normalization")
        for name, module in places
    ):
        return
    line = f"tfamp: {ADAPT.what} {ADAPT.fix}"
    if sys.version_info >= (3, 11):
        error.add_note(line)
    else:
        print(line, file=sys.stderr)
