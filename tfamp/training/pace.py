"""How many steps go into one graph call, and how fast they go."""

import time
from collections.abc import Callable

from tfamp.errors import InputError
from tfamp.training.loop import Loop

# Graph calls grow until they take about this long: Python then costs nothing,
# and a progress bar still moves.
_CALL_SECONDS = 0.5
_MOST_STEPS = 1024


class Pace:
    """Decides how many steps go into the next graph call, and when to report.

    Both hang on how long calls took, which all workers agree on: reading a
    metric takes part of each of them.

    Args:
        steps_per_loop: that many, or "auto" to double and halve them until a
            call takes about half a second.
        agree: gives all workers the same seconds; costs nothing on one.

    Attributes:
        steps: of the next call.

    Raises:
        InputError: for anything but "auto" or a positive integer.
    """

    def __init__(
        self,
        steps_per_loop: int | str,
        agree: Callable[[float], float] = lambda seconds: seconds,
    ):
        self._is_auto = steps_per_loop == "auto"
        steps = 1 if self._is_auto else steps_per_loop
        if not isinstance(steps, int) or steps < 1:
            raise InputError(
                f"steps_per_loop={steps_per_loop!r}; expected 'auto' or a "
                "positive integer."
            )
        self.steps = steps
        self._agree = agree
        self._calls = 0
        self._calls_per_report = 1
        # The first call traces: it tells nothing, and ends in a report.
        self._last = float("-inf")

    def is_due(self) -> bool:
        """Whether to look at the device and report, after one more call."""
        self._calls += 1
        return self._calls >= self._calls_per_report

    def exclude(self, seconds: float) -> None:
        """So much of the time since the last report was no training."""
        self._last += seconds

    def measure(self, steps: int) -> None:
        """Takes note that calls ended now, the last one with so many steps."""
        now = time.perf_counter()
        seconds = self._agree((now - self._last) / max(self._calls, 1))
        self._last, self._calls = now, 0
        if not self._is_auto:
            self._calls_per_report = max(1, int(_CALL_SECONDS // seconds))
        elif steps < self.steps:
            # Cut short by the end of an epoch: it tells nothing.
            return
        elif seconds < _CALL_SECONDS / 2:
            self.steps = min(2 * self.steps, _MOST_STEPS)
        elif seconds > 2 * _CALL_SECONDS:
            self.steps = max(self.steps // 2, 1)


class Clock:
    """Steps and seconds of an epoch, without the call that traces."""

    def __init__(self, loop: Loop):
        self._loop = loop
        self._is_warm = False
        self.begin_epoch()

    def begin_epoch(self, steps_before: int = 0) -> None:
        """Starts anew; so many steps of the epoch another process did."""
        self._steps_before = steps_before
        self._epoch_begin = self._begin = self._now()

    def end_warm_up(self) -> None:
        """The run's first call has ended; it traced, and does not count."""
        if not self._is_warm:
            self._is_warm = True
            self._begin = self._now()

    def exclude(self, seconds: float) -> None:
        """So much of the time so far was no training."""
        self._epoch_begin, self._begin = (
            (begin[0] + seconds, *begin[1:])
            for begin in (self._epoch_begin, self._begin)
        )

    @property
    def steps(self) -> int:
        """Steps of this epoch so far."""
        return self._steps_before + self._loop.steps - self._epoch_begin[1]

    @property
    def examples_per_second(self) -> float:
        seconds, _, examples = self._passed()
        return examples / seconds

    def logs(self) -> dict[str, float]:
        """`step_milliseconds` and `examples_per_second` of the epoch."""
        seconds, steps, examples = self._passed()
        return {
            "step_milliseconds": 1000 * seconds / max(steps, 1),
            "examples_per_second": examples / seconds,
        }

    def _now(self) -> tuple[float, int, int]:
        return time.perf_counter(), self._loop.steps, self._loop.examples

    def _passed(self) -> tuple[float, int, int]:
        """Seconds, steps, examples; of the whole epoch if it was one call."""
        now = self._now()
        begin = self._epoch_begin if now[1] == self._begin[1] else self._begin
        return now[0] - begin[0], now[1] - begin[1], now[2] - begin[2]
