"""A training that takes turns: it waits, trains some epochs, and reports.

All contestants train the same epochs in the same order, and each measures
itself in the same way, whatever its framework: an epoch's time is that from
its begin to the moment when the mean of its losses is a Python number, which
a device has to be waited for.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

# Until the graph is traced and a step's length is known to who adapts to it.
_START_EPOCHS = 2


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many epochs there are, and which are timed.

    Attributes:
        rounds: turns of each contestant.
        timed_epochs: of a turn, after one that warms up what the others have
            left cold.
    """

    rounds: int
    timed_epochs: int = 2

    @property
    def epochs_in_turn(self) -> int:
        return 1 + self.timed_epochs

    @property
    def epochs(self) -> int:
        """Of the whole training."""
        return _START_EPOCHS + self.rounds * self.epochs_in_turn


class Gauge(Protocol):
    """What tells how much memory a training takes, in bytes."""

    def in_use(self) -> int | None:
        """What is in use now."""

    def begin(self) -> None:
        """Forgets the peak: from here on it is a new one."""

    def peak(self) -> int | None:
        """The most that was in use since `begin`."""

    def release(self) -> None:
        """Gives back what a training that waits does not need."""


class Turns:
    """The begins and ends of epochs, as a training's loop meets them.

    Args:
        schedule: which epochs there are.
        gauge: of memory.
        wait: returns when it is this contestant's turn.
        report: takes what a turn, or the start, came to.
        now: a clock, in seconds.
        cpu_now: of the seconds that this process has computed.
    """

    def __init__(
        self,
        schedule: Schedule,
        gauge: Gauge,
        wait: Callable[[], None],
        report: Callable[[dict[str, Any]], None],
        now: Callable[[], float] = time.perf_counter,
        cpu_now: Callable[[], float] = time.process_time,
    ):
        self._schedule = schedule
        self._gauge = gauge
        self._wait = wait
        self._report = report
        self._now = now
        self._cpu_now = cpu_now
        self._epoch = 0
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self._waited = {}

    def begin_epoch(self) -> None:
        """To be called right before an epoch."""
        if self._place == 0:
            self._wait_for_turn()
        if self._place in (None, 1):
            self._gauge.begin()
        self._begin = self._now()

    def end_epoch(self, loss: float) -> None:
        """To be called right after an epoch, with the mean of its losses."""
        self._seconds.append(self._now() - self._begin)
        self._losses.append(loss)
        is_last = self._place == self._schedule.epochs_in_turn - 1
        self._epoch += 1
        if self._epoch == _START_EPOCHS:
            self._send({"start_seconds": self._seconds})
        elif is_last:
            # The first one warmed up.
            self._send({"epoch_seconds": self._seconds[1:]})

    @property
    def _place(self) -> int | None:
        """Of this epoch in its turn; None before the first turn."""
        since = self._epoch - _START_EPOCHS
        return None if since < 0 else since % self._schedule.epochs_in_turn

    def _wait_for_turn(self) -> None:
        self._gauge.release()
        begin, cpu_begin = self._now(), self._cpu_now()
        self._wait()
        self._waited = {
            "waiting_seconds": self._now() - begin,
            "waiting_cpu_seconds": self._cpu_now() - cpu_begin,
        }

    def _send(self, what: dict[str, Any]) -> None:
        self._report(
            {
                **what,
                "losses": self._losses,
                "peak_memory_bytes": self._gauge.peak(),
                **self._waited,
            }
        )
        self._seconds, self._losses = [], []
