"""How far a series of jobs is, and how long the rest will take."""

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text


class JobProgress:
    """A bar on a terminal, else a line for each job; on stderr.

    Args:
        jobs: name and kind of each. Those of one kind take about as long.
    """

    def __init__(self, jobs: Sequence[tuple[str, str]]):
        self._kinds = dict(jobs)
        self._waiting = dict.fromkeys(self._kinds)
        self._seconds: dict[str, list[float]] = {}
        self._begin = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                _TimeLeft(self),
                console=Console(stderr=True, highlight=False),
                transient=True,
            )
            self._task = self._bar.add_task("", total=len(self._kinds))

    def __enter__(self) -> "JobProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def found(self, seconds: Mapping[str, float | None]) -> None:
        """These jobs have their results, and once took that long."""
        for name, each in seconds.items():
            self._count(name, each)
        if seconds:
            self._say(f"{len(seconds)} finished before{self._left()}")

    def begin(self, name: str) -> None:
        """The job starts now."""
        self._begin = time.monotonic()
        if self._bar:
            self._bar.update(self._task, description=name)

    def finished(self, name: str, seconds: float) -> None:
        """The job that was begun has its result."""
        self._end(name, seconds, format_duration(seconds))

    def failed(self, name: str) -> None:
        """The job that was begun has failed, and the others go on."""
        self._end(name, None, "failed")

    def seconds_left(self) -> float | None:
        """An estimate; None before any job has finished."""
        times = [each for kind in self._seconds.values() for each in kind]
        if not times:
            return None
        left = sum(
            _mean(self._seconds.get(self._kinds[name], times))
            for name in self._waiting
        )
        return max(left - (time.monotonic() - self._begin), 0.0)

    def _end(self, name, seconds, how):
        self._count(name, seconds)
        self._begin = time.monotonic()
        self._say(f"{name}  {how}{self._left()}")

    def _count(self, name, seconds):
        del self._waiting[name]
        if seconds is not None:
            self._seconds.setdefault(self._kinds[name], []).append(seconds)

    def _left(self):
        left = self.seconds_left()
        if not self._waiting or left is None:
            return ""
        return f"  about {format_duration(left)} left"

    def _say(self, text):
        done = len(self._kinds) - len(self._waiting)
        line = f"{done}/{len(self._kinds)}  {text}"
        if self._bar:
            self._bar.update(self._task, completed=done)
            self._bar.console.print(line, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)


class _TimeLeft(ProgressColumn):
    # Each run of a bar's `Progress` draws it several times a second.
    def __init__(self, progress: JobProgress):
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        left = self._progress.seconds_left()
        return Text("" if left is None else f"{format_duration(left)} left")


def format_duration(seconds: float) -> str:
    """Such as "41 s", "7 min", "2 h 5 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _mean(values):
    return sum(values) / len(values)
