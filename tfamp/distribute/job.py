"""One job: the same command on every worker, from the first start to the end.

What happens comes through one queue, in order: a worker that ended, a signal
to pass on, an output that no one reads any more.
"""

import contextlib
import dataclasses
import io
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from tfamp.distribute.process_tree import kill_descendants

_EXIT_BAD_INPUT = 2
_EXIT_OUTPUT_GONE = 128 + signal.SIGPIPE
_DRAIN_SECONDS = 5.0

# A progress bar ends its lines with a carriage return.
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)")


@dataclasses.dataclass(frozen=True)
class WorkerEnded:
    """Worker `index` ended with exit status `status`."""

    index: int
    status: int


@dataclasses.dataclass(frozen=True)
class OutputGone:
    """No one reads this process's output any more."""


def run_job(
    events: queue.SimpleQueue,
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    grace_seconds: float,
    restarts: int,
) -> int:
    """Runs a command once per environment, all at the same time.

    Args:
        events: receives `signal.Signals` to pass on from outside.
        command: what every worker runs.
        environments: of each worker, by its number.
        grace_seconds: how long the others may go on after one failed, and all
            after a signal; then they are killed.
        restarts: how often to start all again after one failed. Bad input
            (status 2) and a job that was told to stop are not started again.

    Returns:
        0 where every worker ended with 0, else the status of the first that
        did not: its own, or 128 + N where signal N ended it.
    """
    attempt = 0
    while True:
        attempt += 1
        status, stopped = _run_once(
            events, command, environments, grace_seconds
        )
        if status in (0, _EXIT_BAD_INPUT) or stopped or attempt > restarts:
            return status
        _say(f"restart {attempt} of {restarts}")


def _run_once(events, command, environments, grace_seconds):
    lock = threading.Lock()
    workers, readers = [], []
    for index, environment in enumerate(environments):
        worker = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A worker that signals its own group must not hit the others.
            start_new_session=True,
        )
        workers.append(worker)
        _start_thread(_report_end, events, index, worker)
        for source, sink in (
            (worker.stdout, sys.stdout.buffer),
            (worker.stderr, sys.stderr.buffer),
        ):
            prefix = f"[{index}] ".encode()
            readers.append(
                _start_thread(_pass_on, events, source, sink, prefix, lock)
            )
    try:
        return _watch(events, workers, grace_seconds)
    finally:
        # Before the readers: what a worker left running holds its output open.
        kill_descendants()
        for reader in readers:
            reader.join(_DRAIN_SECONDS)


def _watch(events, workers, grace_seconds):
    """The exit status, and whether the job was told to stop."""
    running = set(range(len(workers)))
    status, stopped = 0, False
    deadline: float | None = None
    while running:
        left = None if deadline is None else deadline - time.monotonic()
        try:
            event = events.get(timeout=left and max(left, 0.0))
        except queue.Empty:
            _say(f"{_names(running)} did not end in time: killed")
            event = None
        if isinstance(event, WorkerEnded):
            running.discard(event.index)
            if event.status and not status:
                status = event.status
                if running and not stopped:
                    deadline = time.monotonic() + grace_seconds
                _say(
                    f"worker {event.index} ended with status {event.status}"
                    + (f"; {_names(running)} still runs" if running else "")
                )
            continue
        if isinstance(event, OutputGone):
            status, stopped = status or _EXIT_OUTPUT_GONE, True
        elif isinstance(event, signal.Signals) and not stopped:
            stopped, deadline = True, time.monotonic() + grace_seconds
            for index in running:
                workers[index].send_signal(event)
            continue
        # Too late, told twice, or for no one: no grace any more.
        deadline = None
        for index in running:
            _kill_group(workers[index].pid)
    return status, stopped


def _report_end(events, index, worker):
    code = worker.wait()
    events.put(WorkerEnded(index, code if code >= 0 else 128 - code))


def _pass_on(
    events, source: io.BufferedReader, sink: BinaryIO, prefix: bytes, lock
) -> None:
    rest = b""
    while chunk := source.read1(65536):
        rest += chunk
        end = 0
        lines = b""
        for line in _LINE.finditer(rest):
            lines += prefix + line[0]
            end = line.end()
        rest = rest[end:]
        _write(events, sink, lines, lock)
    if rest:
        _write(events, sink, prefix + rest + b"\n", lock)


def _write(events, sink, lines, lock):
    # All workers share the sink, and a line must stay whole.
    with lock:
        try:
            sink.write(lines)
            sink.flush()
        except (BrokenPipeError, ValueError):
            events.put(OutputGone())


def _kill_group(pid):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _names(indices):
    return "worker " + ", ".join(str(index) for index in sorted(indices))


def _say(text):
    print(f"[launch] {text}", file=sys.stderr, flush=True)


def _start_thread(function, *args):
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread
