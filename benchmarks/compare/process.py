"""A contestant's process: trains when it is told to, and else stands still.

It ends with whoever started it, also by SIGKILL, and so does what it started,
such as the processes that `torch.compile` compiles in.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from benchmarks.compare.cases import Case
from benchmarks.compare.contestants import Contestant
from benchmarks.compare.turns import Schedule, Turns
from tfamp.distribute.process_tree import adopt_orphans, kill_descendants
from tfamp.recipe import describe_exit, quiet_tensorflow

GO = "go"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One process of a comparison.

    Attributes:
        contestant: who trains.
        case: what.
        precision: in which.
        device: "cpu" or "gpu".
        threads: of one operation; also the cores that the process may use,
            where the system lets it say so.
        schedule: when.
        weights: a .npz file of what to begin with, for PyTorch.
        log: where the output goes.
    """

    contestant: Contestant
    case: Case
    precision: str
    device: str
    threads: int
    schedule: Schedule
    weights: pathlib.Path
    log: pathlib.Path

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.contestant.name} {self.precision}"


def run(entry: Entry, connection: Connection) -> None:
    """Does the work of a process; what it finds goes through the connection.

    A dict for the start and for each turn, which follows a `GO`; or the one
    line that says why there is nothing more to come.
    """
    settle(entry.log, entry.threads)
    try:
        _train(entry, connection)
    except Exception as error:
        described = describe_exit(error)
        if described is None:
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        connection.send(
            described[0] if described else f"{type(error).__name__}: {lines[0]}"
        )


def settle(log: pathlib.Path, threads: int) -> None:
    """Makes this process one that a comparison started.

    Args:
        log: where its output goes from here on.
        threads: cores that it may use, the first of those it has.
    """
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    adopt_orphans()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform.startswith("linux"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    quiet_tensorflow()


def _train(entry: Entry, connection: Connection) -> None:
    is_torch = entry.contestant.framework == "torch"
    if is_torch:
        from benchmarks.compare import torch_training as training
    else:
        from benchmarks.compare import keras_training as training
    gauge = training.prepare(entry.device, entry.threads)
    before = gauge.in_use()

    def wait():
        if connection.recv() != GO:
            raise ValueError("a process is told nothing but to go")

    turns = Turns(
        entry.schedule,
        gauge,
        wait,
        report=lambda found: connection.send(
            {**found, "memory_before_bytes": before}
        ),
    )
    options = (
        {"device": entry.device, "weights": entry.weights} if is_torch else {}
    )
    training.train(
        entry.contestant,
        entry.case,
        entry.precision,
        entry.schedule.epochs,
        turns,
        **options,
    )


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    kill_descendants()
    os._exit(1)
