"""The processes of one start of a job: started, watched, waited for."""

import contextlib
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

_POLL_SECONDS = 0.005
# To print where it stands.
_DUMP_SECONDS = 3.0

# TensorFlow is imported once; each process is a fork of that.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["benchmarks.chaos.job"])


class Running:
    """One start of a job, in as many processes as it has.

    Args:
        job: a `benchmarks.chaos.job.Job`.
        folder: of the run; made where it is not there.
        saves: whether it keeps checkpoints.
    """

    def __init__(self, job: Any, folder: pathlib.Path, saves: bool):
        from benchmarks.chaos.job import program

        folder.mkdir(parents=True, exist_ok=True)
        addresses = []
        if job.processes > 1:
            addresses = _addresses(job.processes)
        self._processes = []
        self._readers = []
        for worker in range(job.processes):
            mine, theirs = _processes.Pipe(duplex=False)
            process = _processes.Process(
                target=program,
                args=(job, folder, saves, worker, addresses, theirs),
            )
            process.start()
            theirs.close()
            reader = threading.Thread(
                target=_copy, args=(mine, folder / f"errors-{worker}.txt")
            )
            reader.start()
            self._processes.append(process)
            self._readers.append(reader)

    def is_alive(self) -> bool:
        return all(each.is_alive() for each in self._processes)

    def pid(self, generator: random.Random) -> int:
        return generator.choice(self._processes).pid

    def until(
        self, checkpoints: pathlib.Path, number: int, seconds: float
    ) -> None:
        """Returns when that checkpoint is there, or some time has passed."""
        end = time.monotonic() + seconds
        while self.is_alive() and newest(checkpoints) < number:
            if time.monotonic() > end:
                return
            time.sleep(_POLL_SECONDS)

    def wait(self, seconds: float) -> list[int | None]:
        """Their exit statuses; None for one that hung, and was killed."""
        end = time.monotonic() + seconds
        statuses = []
        for each in self._processes:
            each.join(max(end - time.monotonic(), 0.1))
            statuses.append(each.exitcode)
            if each.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGUSR1)
                time.sleep(_DUMP_SECONDS)
                each.kill()
                each.join()
        for reader in self._readers:
            reader.join()
        return statuses


def newest(checkpoints: pathlib.Path) -> int:
    """The number of the newest checkpoint; 0 for none."""
    numbers = [
        int(path.stem.partition("-")[2])
        for path in checkpoints.glob("ckpt-*.index")
    ]
    return max(numbers, default=0)


def _copy(source: Connection, path: pathlib.Path) -> None:
    with source, open(path, "ab", buffering=0) as file:
        while chunk := os.read(source.fileno(), 65536):
            file.write(chunk)


def _addresses(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    with contextlib.ExitStack() as stack:
        for each in sockets:
            stack.enter_context(each).bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
