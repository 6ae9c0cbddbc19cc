"""What is seen of a run: in a terminal, in a notebook, in a pipe."""

import contextlib
import math
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping

import keras
import numpy as np
from absl import logging
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Fits beside a sidebar.
_NOTEBOOK_COLUMNS = 100
_NOTEBOOK_BAR = 20
_NOTEBOOK_SECONDS = 0.5
# Whoever reads a log is to see within 30 s that training goes on.
_PIPE_SECONDS = 25.0

# The logs of `tfamp.fit` that are no metric, in the order they are shown; the
# last are left out first where there is no room.
_RUN_FIGURES = (
    "loss_scale",
    "skipped_steps",
    "examples_per_second",
    "step_milliseconds",
    "peak_memory_bytes",
)
_WAITING = "waiting for the first step"


class ProgressBar(keras.callbacks.Callback):
    """Shows loss, metrics, loss scale, skipped steps, speed and time left.

    A terminal gets a live bar, and above it one line for each finished epoch;
    a notebook a line with a bar, that is written over, and its figures stay
    when the epoch is over.
    Anything else, as a pipe or a log file, gets a line for each epoch, and in
    epochs that take longer one every 25 seconds, in plain text.

    Args:
        one_line_per_epoch: Leaves out what is seen before an epoch ends.
    """

    def __init__(self, one_line_per_epoch: bool = False):
        super().__init__()
        self._one_line_per_epoch = one_line_per_epoch
        self._live: Live | None = None
        self._ticker: _Ticker | None = None
        self._steps: int | None = None
        self._steps_done = 0
        # Figures that were told last in this epoch.
        self._logs: Mapping[str, float] = {}
        # Columns of the line that is to be written over.
        self._written = 0

    def on_train_begin(self, logs=None):
        self._steps = self.params.get("steps")

    def on_epoch_begin(self, epoch, logs=None):
        self.close()
        self._epoch_start = time.monotonic()
        self._steps_done = 0
        self._logs = {}
        self._title = f"epoch {epoch + 1}/{self.params.get('epochs', '?')}"
        self._doing = ""
        if self._one_line_per_epoch:
            return
        if not keras.config.is_interactive_logging_enabled():
            return
        console = Console(highlight=False)
        # Asked of the stream itself: rich also takes a pipe for a terminal
        # where FORCE_COLOR is set, as many CI systems do.
        if sys.stdout.isatty() and not console.is_dumb_terminal:
            self._start_bar(console)
        elif _is_notebook():
            self._ticker = _Ticker(_NOTEBOOK_SECONDS, self._write_over)
        else:
            self._ticker = _Ticker(_PIPE_SECONDS, self._write_line)

    def on_train_batch_end(self, batch, logs=None):
        # An execution that the data's end cut short counts as whole.
        self._steps_done = min(batch + 1, self._steps or batch + 1)
        if logs:
            self._logs = dict(logs)
        if self._live is not None:
            self._progress.update(self._task, completed=self._steps_done)
            if logs:
                width = self._live.console.width
                self._figures.plain = format_figures(logs, width)

    def on_test_begin(self, logs=None):
        self._doing = " validation"
        if self._live is not None:
            self._progress.update(
                self._task, description=f"{self._title} validation"
            )

    def on_epoch_end(self, epoch, logs=None):
        written = self.close()
        # Known only now where the data set does not tell its length.
        self._steps = self.params.get("steps") or self._steps_done
        seconds = time.monotonic() - self._epoch_start
        self._print(self._title, logs or {}, f"{seconds:.1f} s", written)

    def on_train_end(self, logs=None):
        self.close()

    def show_final(self, logs: Mapping[str, float]) -> None:
        """A last line, of the weights that training leaves."""
        self._print("final (averaged weights)", logs)

    def close(self) -> int:
        """Takes what is live off the screen and gives the cursor back.

        Whoever drives the callbacks calls it when training raises, because
        Keras tells callbacks nothing then. Safe to call at any time.

        Returns:
            The columns of a line that is to be written over.
        """
        if self._ticker is not None:
            self._ticker.stop()
            self._ticker = None
        if self._live is not None:
            self._restore_terminal()
            self._live = None
        written, self._written = self._written, 0
        return written

    def _print(self, title, logs, end="", written=0):
        line = "  ".join(filter(None, (title, format_figures(logs), end)))
        if not keras.config.is_interactive_logging_enabled():
            logging.info(line)
            return
        if sys.stdout.isatty() or _is_notebook():
            room = _columns() - len(title) - len(end) - 4
            line = "  ".join(
                filter(None, (title, format_figures(logs, room), end))
            )
        start = f"\r{' ' * written}\r" if written else ""
        print(f"{start}{line}", flush=True)

    def _so_far(self) -> str:
        steps = f"{self._steps_done}/{self._steps or '?'}{self._doing}"
        seconds = time.monotonic() - self._epoch_start
        if not self._steps or not 0 < self._steps_done < self._steps:
            return f"{steps}  {_time(seconds)}"
        left = seconds * (self._steps / self._steps_done - 1)
        return f"{steps}  {_time(seconds)}, {_time(left)} left"

    def _write_line(self):
        figures = format_figures(self._logs) or _WAITING
        print(f"{self._title}  {self._so_far()}  {figures}", flush=True)

    def _write_over(self):
        line = f"{self._title}  {self._so_far()}"
        if self._steps:
            bar = _bar(self._steps_done / self._steps)
            line = f"{self._title}  {bar} {self._so_far()}"
        room = _columns() - len(line) - 2
        # One line only can be written over.
        figures, *_ = format_figures(self._logs, room).split("\n")
        line = f"{line}  {figures or _WAITING}"[: _columns()]
        padding = " " * max(0, self._written - len(line))
        self._written = len(line)
        print(f"\r{line}{padding}", end="", flush=True)

    def _start_bar(self, console):
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(self._title, total=self._steps)
        self._figures = Text(_WAITING, no_wrap=True, overflow="ellipsis")
        live = Live(
            Group(self._progress, self._figures),
            console=console,
            refresh_per_second=4,
            transient=True,
            # rich would send it to stdout, past a user's `2> errors.txt`.
            redirect_stderr=sys.stderr.isatty(),
        )
        # Also when the interpreter exits: a terminal without a cursor would
        # outlive the process.
        self._restore_terminal = weakref.finalize(self, live.stop)
        self._live = live
        live.start()


class _Ticker:
    """Calls a method every so many seconds, as long as its object lives."""

    def __init__(self, seconds: float, method: Callable[[], None]):
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=_tick,
            args=(self._ended, seconds, weakref.WeakMethod(method)),
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


def _tick(ended: threading.Event, seconds: float, method) -> None:
    while not ended.wait(seconds):
        call = method()
        if call is None:
            return
        # Whoever read may have gone; the epoch's own line will say so.
        with contextlib.suppress(OSError, ValueError):
            call()
        del call


def format_figures(
    logs: Mapping[str, float], columns: int | None = None
) -> str:
    """One line: loss, metrics, their `val_` twins, then scale, skips, speed.

    The loss scale shows as a power of two, `2^16`, where it is one; it and
    skipped steps only where the loss is scaled or something was skipped. A
    metric that is an array has no place in a line.

    Args:
        logs: figures by name.
        columns: leaves out what there is no room for, the speed first, and
            breaks the line where metrics alone are longer.
    """
    # Keras hands logs to callbacks in alphabetical order.
    shown = sorted((n for n in logs if not np.ndim(logs[n])), key=_place)
    if logs.get("loss_scale") == 1:
        shown.remove("loss_scale")
    if "loss_scale" not in shown and logs.get("skipped_steps") == 0:
        shown.remove("skipped_steps")
    figures = [_format(name, logs[name]) for name in shown]
    if columns is None:
        return "  ".join(figures)
    while shown and shown[-1] in _RUN_FIGURES:
        if len("  ".join(figures)) <= columns:
            break
        shown.pop()
        figures.pop()
    return _broken(figures, columns)


def _broken(figures: list[str], columns: int) -> str:
    lines: list[str] = []
    for figure in figures:
        if lines and len(lines[-1]) + 2 + len(figure) <= columns:
            lines[-1] += f"  {figure}"
        else:
            lines.append(figure)
    return "\n    ".join(lines)


def _time(seconds: float) -> str:
    """As short as it can be told: `42 s`, `4:02` minutes, `1:04:02` hours."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    start = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{start}:{rest:02d}"


def _bar(share: float) -> str:
    """A bar of text, as wide whatever share of it is done."""
    done = int(share * _NOTEBOOK_BAR)
    return "━" * done + "─" * (_NOTEBOOK_BAR - done)


def _is_notebook() -> bool:
    return Console().is_jupyter


def _columns() -> int:
    if sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return _NOTEBOOK_COLUMNS


def _place(name):
    if name in _RUN_FIGURES:
        return 2, _RUN_FIGURES.index(name)
    return name.startswith("val_"), not name.endswith("loss")


def _format(name, value):
    match name:
        case "loss_scale":
            return f"scale {_power_of_two(value)}"
        case "skipped_steps":
            return f"skipped {value:.0f}"
        case "examples_per_second":
            return f"{value:,.0f} examples/s"
        case "step_milliseconds":
            digits = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            return f"{digits} ms/step"
        case "peak_memory_bytes":
            return f"{value / 2**30:.2f} GiB"
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{name} {value:.4f}" if plain else f"{name} {value:.3e}"


def _power_of_two(value):
    exponent = math.log2(value) if value > 0 else math.nan
    return f"2^{exponent:.0f}" if exponent.is_integer() else f"{value:.6g}"
