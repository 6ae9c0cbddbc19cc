"""The comparison of one model: processes that train in turns, round by round.

All of them live until the last round, so that tracing and compiling are paid
once. One computes at a time; the others wait at a pipe.
"""

import contextlib
import dataclasses
import multiprocessing
import pathlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.compare import process
from benchmarks.compare.process import GO, Entry
from tfamp.analysis.jobs.progress import JobProgress

# Seconds that a start or a turn may take: XLA's and PyTorch's compilers need
# minutes, on a busy machine many.
_LONGEST = 3600
_SECONDS_TO_END = 20

_MEMINFO = pathlib.Path("/proc/meminfo")
# What must be free before another process starts, as a multiple of the
# largest so far: those that are there grow again when it is their turn.
_FREE_PER_PROCESS = 1.5


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model's comparison came to.

    Attributes:
        starts: of each entry that started `contestant`, `precision`,
            `start_seconds` of its first epochs, `losses`,
            `peak_memory_bytes` and `memory_before_bytes`.
        turns: the same with `round` and `epoch_seconds`, in the order they
            were made, and what it did while it waited.
        failures: `contestant`, `precision` and `line` of those that failed.
    """

    starts: list[dict[str, Any]]
    turns: list[dict[str, Any]]
    failures: list[dict[str, Any]]


def run(
    entries: Sequence[Entry], progress: JobProgress, starts_at_once: int = 1
) -> Outcome:
    """Starts the entries, and lets them train in turns.

    Each second round goes through them backwards: what drifts, such as the
    heat of the machine, touches them alike.

    Args:
        entries: of one model.
        progress: knows of each `start_name` and `round_name`.
        starts_at_once: so many compile side by side; their start is not
            timed then.

    Returns:
        What was measured; who failed, or found no memory to start in, is left
        out from there on, and named.
    """
    outcome = Outcome([], [], [])
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(_racer(entry)) for entry in entries]
        running = _start(racers, outcome, progress, starts_at_once)
        for number in range(1, entries[0].schedule.rounds + 1):
            name = round_name(entries[0], number)
            progress.begin(name)
            begin = time.monotonic()
            for racer in list(running)[:: 1 if number % 2 else -1]:
                found = racer.turn(outcome)
                if found is None:
                    running.remove(racer)
                else:
                    outcome.turns.append({"round": number, **found})
            progress.finished(name, time.monotonic() - begin)
    return outcome


def start_name(entry: Entry) -> str:
    """What a race calls the start of an entry."""
    return f"{entry.name}, start"


def round_name(entry: Entry, number: int) -> str:
    """What a race calls a round."""
    return f"{entry.case.name}, round {number}"


class _Racer:
    """A process that trains when it is told to."""

    def __init__(self, entry: Entry):
        self.entry = entry
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=process.run, args=(entry, other), name=entry.name
        )
        self._other = other

    def start(self) -> dict[str, Any] | str:
        """What the start came to, or the line that says why not."""
        self._process.start()
        # The end of a process is seen where nobody else holds its end.
        self._other.close()
        return self._receive()

    def turn(self, outcome: Outcome) -> dict[str, Any] | None:
        """Lets it train; None where it failed, which the outcome then has."""
        try:
            self._connection.send(GO)
            found = self._receive()
        except OSError:
            found = self._how_it_ended()
        return self.note(found, outcome)

    def note(
        self, found: dict[str, Any] | str, outcome: Outcome
    ) -> dict[str, Any] | None:
        """What was found, with whose it is; a failure goes to the outcome."""
        key = {
            "contestant": self.entry.contestant.name,
            "precision": self.entry.precision,
        }
        if isinstance(found, dict):
            return {**key, **found}
        outcome.failures.append({**key, "line": found})
        return None

    def end(self) -> None:
        """Ends the process, which has nothing left to lose."""
        self._other.close()
        self._connection.close()
        if self._process.pid is not None:
            self._process.kill()
            self._process.join(_SECONDS_TO_END)

    def _receive(self) -> dict[str, Any] | str:
        if not self._connection.poll(_LONGEST):
            self._process.kill()
            return f"did not answer within {_LONGEST} s"
        try:
            return self._connection.recv()
        except EOFError:
            return self._how_it_ended()

    def _how_it_ended(self) -> str:
        self._process.join(_SECONDS_TO_END)
        code = self._process.exitcode
        how = f"signal {-code}" if code and code < 0 else f"status {code}"
        return f"ended with {how}; see {self.entry.log}"


@contextlib.contextmanager
def _racer(entry: Entry) -> Iterator[_Racer]:
    racer = _Racer(entry)
    try:
        yield racer
    finally:
        racer.end()


def _start(racers, outcome, progress, starts_at_once) -> list[_Racer]:
    """Starts all; returns those that came through."""
    running = []

    def start(racer):
        begin = time.monotonic()
        return racer.start(), time.monotonic() - begin

    with ThreadPoolExecutor(starts_at_once) as pool:
        for i in range(0, len(racers), starts_at_once):
            group = racers[i : i + starts_at_once]
            # Not before: only now it shows how much memory the others took.
            shortage = _shortage(outcome, len(group))
            progress.begin(start_name(group[0].entry))
            results = (
                [(shortage, 0.0)] * len(group)
                if shortage
                else pool.map(start, group)
            )
            for racer, (found, seconds) in zip(group, results, strict=True):
                name = start_name(racer.entry)
                record = racer.note(found, outcome)
                if record is None:
                    progress.failed(name)
                    continue
                outcome.starts.append(record)
                running.append(racer)
                progress.finished(name, seconds)
    return running


def _shortage(outcome: Outcome, number: int) -> str | None:
    """A line where so many more processes may not fit; None where they do.

    The system would kill any of them, or something else.
    """
    peaks = [start["peak_memory_bytes"] or 0 for start in outcome.starts]
    if not peaks or not _MEMINFO.exists():
        return None
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    needed = _FREE_PER_PROCESS * number * max(peaks)
    if free >= needed:
        return None
    return (
        f"not started: {free / 2**30:.1f} GiB are free beside {len(peaks)} "
        f"processes, and it may take {needed / 2**30:.1f}; compare fewer with "
        "--contestants or --precisions"
    )
