"""SIGTERM while training: finish the step, save, and ask to be restarted."""

import contextlib
import contextvars
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from tfamp.errors import Preempted

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


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


_current: contextvars.ContextVar[Preemption | None] = contextvars.ContextVar(
    "tfamp_preemption", default=None
)


def current() -> Preemption:
    """That of the call of fit which runs; one that nobody asks, else."""
    return _current.get() or Preemption()


def ending_on_sigterm(
    if_given: str,
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Decorates a function that SIGTERM ends where it can be gone on with.

    It asks `current()` when it comes to a point to end at.

    Args:
        if_given: its keyword argument without which nothing could be saved:
            then SIGTERM stays what it is.
    """

    def decorate(
        function: Callable[_Arguments, _Result],
    ) -> Callable[_Arguments, _Result]:
        @functools.wraps(function)
        def watched(
            *args: _Arguments.args, **kwargs: _Arguments.kwargs
        ) -> _Result:
            if kwargs.get(if_given) is None:
                return function(*args, **kwargs)
            preemption = Preemption()
            token = _current.set(preemption)
            try:
                with preemption.watched():
                    result = function(*args, **kwargs)
            finally:
                _current.reset(token)
            if preemption.is_requested:
                raise Preempted("SIGTERM: training is over, and saved.")
            return result

        return watched

    return decorate
