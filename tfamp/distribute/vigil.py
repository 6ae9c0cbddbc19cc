"""Ends a worker whose others are gone, whatever TensorFlow waits for.

TensorFlow's coordination service tells of a worker that misses its heartbeats.
It tells nothing of one that left in good order, by an exception or `sys.exit`,
and not all that waits for a lost one listens to it. So each worker looks for
itself, from a thread, whether the others' ports answer. Where one does not for
long, what waits is aborted; where that does not help, the process ends.

A worker that stands still answers: the system does so for it.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.errors import Preempted

PROBE_SECONDS = 2.0
# Longer than TensorFlow takes to find a dead worker by itself.
GONE_SECONDS = 25.0
# To come out of what was aborted.
ABORTED_SECONDS = 20.0

_TIMEOUT_SECONDS = 5.0


class Vigil:
    """One process's watch over the others of its job.

    Args:
        peers: host and port of each that is looked at, by job and number.
        told: the line to end with, from the name of the worker that is gone.
    """

    def __init__(
        self,
        peers: dict[tuple[str, int], tuple[str, int]],
        told: Callable[[str], str],
    ):
        self._peers = peers
        self._told = told
        self._main = threading.main_thread().ident
        # How many blocks the main thread is in, of either kind.
        self._needs_all = 0
        self._is_alone = 0

    def begin(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def needs_all(self) -> Iterator[None]:
        """Within it, the process cannot go on without the others."""
        self._needs_all += 1
        try:
            yield
        finally:
            self._needs_all -= 1

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within it, it can: they may have come to their end before."""
        self._is_alone += 1
        try:
            yield
        finally:
            self._is_alone -= 1

    def _watch(self) -> None:
        since: dict[tuple[str, int], float] = {}
        while True:
            time.sleep(PROBE_SECONDS)
            now = time.monotonic()
            for task, address in self._peers.items():
                if _answers(address):
                    since.pop(task, None)
                elif now - since.setdefault(task, now) > GONE_SECONDS:
                    self._end(task)
                    return

    def _end(self, task: tuple[str, int]) -> None:
        job, number = task
        with contextlib.suppress(Exception):
            # In TensorFlow's words, which are looked for where it raises.
            tensorflow_internals.abort_collectives(
                tf.errors.UNAVAILABLE,
                "Collective ops is aborted: the port does not answer of "
                f"remote target /job:{job}/replica:0/task:{number}",
            )
        since, place = time.monotonic(), None
        while True:
            time.sleep(PROBE_SECONDS)
            now = self._place()
            if now is None or now != place:
                since, place = time.monotonic(), now
            elif time.monotonic() - since > ABORTED_SECONDS:
                line = self._told(f"{job} {number}")
                print(f"tfamp: {line}", file=sys.stderr, flush=True)
                os._exit(Preempted.STATUS)

    def _place(self) -> tuple[int, int] | None:
        """Where the main thread stands; None where it may stay."""
        frame = sys._current_frames().get(self._main or 0)
        if not self._needs_all or self._is_alone or frame is None:
            return None
        return id(frame), frame.f_lasti


_current: Vigil | None = None


def begin(
    addresses: Sequence[tuple[str, int]],
    tasks: Sequence[tuple[str, int]],
    index: int,
    told: Callable[[str], str],
) -> None:
    """Begins this process's watch over the other workers.

    The first looks at all, the others at it: whom it leaves for, they leave
    for it.

    Args:
        addresses: host and port of all workers.
        tasks: job and number of each.
        index: which of them this process is.
        told: the line to end with, from the name of the worker that is gone.
    """
    global _current
    if _current is not None:
        return
    peers = {
        tasks[worker]: address
        for worker, address in enumerate(addresses)
        if worker != index and 0 in (index, worker)
    }
    _current = Vigil(peers, told)
    _current.begin()


def needs_all() -> contextlib.AbstractContextManager[None]:
    """As `Vigil.needs_all`, of this process's; nothing for one alone."""
    return (
        contextlib.nullcontext() if _current is None else _current.needs_all()
    )


def alone() -> contextlib.AbstractContextManager[None]:
    """As `Vigil.alone`, of this process's; nothing for one alone."""
    return contextlib.nullcontext() if _current is None else _current.alone()


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, _TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
