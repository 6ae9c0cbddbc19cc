"""Times the steps of a run from its callbacks, without changing the run.

A window is what `tfamp.fit` does between two reports: one or more graph calls
of many steps, at the end of which it reads the metrics, and so waits for the
device. Nothing waits in between.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfamp.analysis.bench.feed import Feed

# One of them may be disturbed: the median then still stands.
_LEAST_WINDOWS = 3
_WARM_UP_STEPS = 5
# Where an epoch cuts calls short, no two of them may ever be alike.
_MOST_WARM_UP_WINDOWS = 12


class Phase:
    """The windows of one kind of data, the warm-up apart.

    `fit` doubles the steps of a call until one takes about half a second. The
    warm-up lasts until a window has as many steps as the one before, and for
    some steps at least.

    Args:
        steps: to time, at least.
        call_steps: of the window before the first one, where there was one.

    Attributes:
        warm_up_steps: steps that were not timed.
        windows: steps and seconds of each timed window.
    """

    def __init__(self, steps: int, call_steps: int | None = None):
        self.warm_up_steps = 0
        self.windows: list[tuple[int, float]] = []
        self._steps = steps
        self._last = call_steps
        self._warm_up_windows = 0
        self._is_settled = False

    def add(self, steps: int, seconds: float) -> None:
        """Takes note of a window."""
        if self._is_settled:
            self.windows.append((steps, seconds))
            return
        self.warm_up_steps += steps
        self._warm_up_windows += 1
        is_steady = steps == self._last
        self._last = steps
        self._is_settled = self.warm_up_steps >= _WARM_UP_STEPS and (
            is_steady or self._warm_up_windows >= _MOST_WARM_UP_WINDOWS
        )

    @property
    def is_settled(self) -> bool:
        """Whether the warm-up is over."""
        return self._is_settled

    @property
    def is_done(self) -> bool:
        """Whether enough steps are timed."""
        return (
            self.timed_steps >= self._steps
            and len(self.windows) >= _LEAST_WINDOWS
        )

    @property
    def timed_steps(self) -> int:
        return sum(steps for steps, _ in self.windows)

    @property
    def call_steps(self) -> int | None:
        """Steps of the last window."""
        return self.windows[-1][0] if self.windows else self._last

    @property
    def step_milliseconds(self) -> float:
        """Of a step: the median over the windows."""
        return 1000 * statistics.median(
            seconds / steps for steps, seconds in self.windows
        )


class _WindowCallback(keras.callbacks.Callback):
    """Calls `on_window(steps, seconds, logs)` at each report of `fit`."""

    # What says so is not told of each batch, and leaves it to fit how many
    # steps go into a call.
    tfamp_takes_reports = True

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        super().__init__()
        self._now = now

    def on_epoch_begin(self, epoch, logs=None):
        self._last_step, self._last_time = -1, self._now()

    def on_train_batch_end(self, batch, logs=None):
        now = self._now()
        steps, seconds = batch - self._last_step, now - self._last_time
        self.on_window(steps, seconds, logs or {})
        # What was done above is no part of the next window.
        self._last_step, self._last_time = batch, self._now()

    def on_window(
        self, steps: int, seconds: float, logs: Mapping[str, Any]
    ) -> None:
        raise NotImplementedError


class FiguresAreIn(BaseException):
    """Leaves the recipe's `train`: there is nothing more to see.

    No `Exception`, so that no recipe takes it for an error of its own.
    """


class StepTimer(_WindowCallback):
    """Times a run on its own data, then on data in memory, and leaves it.

    The first call, which traces and compiles, has data in memory, so that it
    does not wait for the pipeline to start.

    Args:
        feed: the data of the run.
        steps: to time, of each of the two.
        between: called after the run's own data were timed.
        now: a clock, in seconds.

    Attributes:
        first_call_seconds: of the first window.
        own: the windows on the recipe's data.
        held: the windows on data in memory.
        skipped_steps: during the windows that count.
    """

    def __init__(
        self,
        feed: Feed,
        steps: int,
        between: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(now)
        self.first_call_seconds: float | None = None
        self.own = Phase(steps)
        self.held = Phase(steps)
        self.skipped_steps = 0
        self._skips_before = 0
        self._feed = feed
        self._steps = steps
        self._between = between

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        # `fit` counts them anew in each epoch.
        self._skips_before = 0

    def on_train_begin(self, logs=None):
        self._feed.hold(True)

    def on_window(self, steps, seconds, logs):
        if self.first_call_seconds is None:
            self.first_call_seconds = seconds
            self._feed.hold(False)
            self._skips_before = logs.get("skipped_steps", 0)
        elif not self.own.is_done:
            self._own_window(steps, seconds, logs)
        else:
            self.held.add(steps, seconds)
            if self.held.is_done:
                raise FiguresAreIn

    def _own_window(self, steps, seconds, logs):
        is_timed = self.own.is_settled
        self.own.add(steps, seconds)
        skips = logs.get("skipped_steps", 0)
        self.skipped_steps += is_timed * int(skips - self._skips_before)
        self._skips_before = skips
        if self.own.is_done:
            self._between()
            self.held = Phase(self._steps, self.own.call_steps)
            self._feed.hold(True)

    @property
    def compile_seconds(self) -> float:
        """The first call without the steady step that is in it."""
        steady = self.held.step_milliseconds / 1000
        return max((self.first_call_seconds or 0.0) - steady, 0.0)

    def figures(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        own, held = self.own.step_milliseconds, self.held.step_milliseconds
        return {
            "step_milliseconds": own,
            "in_memory_step_milliseconds": held,
            "input_share": 1 - held / own,
            "examples_per_second": 1000 * self._feed.rows / own,
            "compile_seconds": self.compile_seconds,
            "warm_up_steps": self.own.warm_up_steps,
            "timed_steps": self.own.timed_steps,
            "skipped_steps": self.skipped_steps,
            "windows": [list(window) for window in self.own.windows],
        }


class Tracer(_WindowCallback):
    """Leaves a trace of one window after the warm-up, and the run.

    Args:
        feed: the data of the run; its own ones.
        folder: for TensorBoard.
    """

    # Their graph is traced at the first of them; some more settle.
    _STEPS_BEFORE = 3

    def __init__(self, feed: Feed, folder: str):
        super().__init__()
        self._folder = folder
        self._feed = feed
        self._steps = 0
        self._is_tracing = False

    def on_train_begin(self, logs=None):
        self._feed.hold(False)

    def on_window(self, steps, seconds, logs):
        if self._is_tracing:
            tf.profiler.experimental.stop()
            raise FiguresAreIn
        self._steps += steps
        if self._steps >= self._STEPS_BEFORE:
            tf.profiler.experimental.start(self._folder)
            self._is_tracing = True


class Trial(_WindowCallback):
    """Leaves the run after some steps: they went through."""

    # The second call is the first that has all optimizer state in use.
    _STEPS = 3

    def on_train_begin(self, logs=None):
        self._steps = 0

    def on_window(self, steps, seconds, logs):
        self._steps += steps
        if self._steps >= self._STEPS:
            raise FiguresAreIn
