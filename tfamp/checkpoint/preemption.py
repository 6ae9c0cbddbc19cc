"""SIGTERM while training: finish the step, save, and ask to be restarted."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Preemption:
    """Whether this process was told to end.

    Attributes:
        is_requested: set by SIGTERM, which then does nothing else.
    """

    def __init__(self):
        self.is_requested = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, SIGTERM is noted; outside, it is what it was before."""
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread only.
            yield
            return
        former = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            # A handler that was not installed from Python cannot be restored.
            signal.signal(signal.SIGTERM, former or signal.SIG_DFL)

    def _note(self, *_) -> None:
        self.is_requested = True
