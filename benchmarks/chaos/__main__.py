"""Disturbs jobs at random moments, and compares how they end.

    python -m benchmarks.chaos --runs=12 --seed=0 --output_dir=runs/chaos

Each job is made of random parts, and trained once without a disturbance. Then
it is started again and again, disturbed, and started until it ends by itself.
Final weights, optimizer and the best file of `ModelCheckpoint` must be those of
the first, bit for bit. Prints a Markdown table, and a line for each run that
ended otherwise. A run takes about 20 seconds of a core; hours of it are
`--runs=1000`.
"""

import collections
import dataclasses
import multiprocessing
import pathlib
import random
import shutil
import socket
import sys
import time

import tfamp
from benchmarks import program
from tfamp.recipe import flag

# What jobs end with: done, done without, told to end, a worker lost, killed.
_EXPECTED = (0, 2, 75, -9)
_STARTS = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    runs: int = flag(12, "disturbed runs; 1000 take hours")
    per_job: int = flag(3, "disturbed runs of each job")
    processes: tuple[str, ...] = flag(
        ("1", "1", "1", "2"), "processes of a job, drawn from these"
    )
    stop_seconds: float = flag(60.0, "how long SIGSTOP lasts")
    job_seconds: float = flag(300.0, "after which a process counts as hung")
    seed: int = flag(0, "of all that is random")
    output_dir: str = flag(
        "", "new folder; of runs that ended right none stays"
    )


@dataclasses.dataclass
class Outcome:
    """How a disturbed run went."""

    job: str
    processes: int
    disturbances: list[str]
    statuses: list[int | None]
    problem: str


def main(config: Config) -> list[Outcome]:
    """Runs them all; returns how each went."""
    folder = pathlib.Path(config.output_dir or ".")
    if not config.output_dir or folder.exists():
        raise tfamp.InputError(
            f"output_dir={config.output_dir!r}; expected the name of a folder "
            "that does not exist yet."
        )
    generator = random.Random(config.seed)
    outcomes: list[Outcome] = []
    while len(outcomes) < config.runs:
        count = min(config.per_job, config.runs - len(outcomes))
        outcomes += _runs_of_job(config, generator, folder, count)
    _print_table(outcomes)
    return outcomes


def _runs_of_job(config, generator, folder, count) -> list[Outcome]:
    from benchmarks.chaos.job import draw

    job = draw(generator, int(generator.choice(config.processes)))
    alone = folder / "alone"
    outcomes: list[Outcome] = []
    statuses = _start(job, alone, False, config).wait(config.job_seconds)
    problem = "" if set(statuses) == {0} else f"undisturbed: {statuses}"
    while not problem and len(outcomes) < count:
        disturbed = folder / "disturbed"
        outcome = _disturbed_run(job, config, generator, disturbed)
        outcome.problem = outcome.problem or _difference(alone, disturbed)
        outcomes.append(outcome)
        _report(outcome)
        if outcome.problem:
            shutil.move(disturbed, folder / f"failed-{time.time_ns()}")
        else:
            shutil.rmtree(disturbed)
    if problem:
        outcomes.append(Outcome(job.parts(), job.processes, [], [], problem))
        _report(outcomes[-1])
    shutil.rmtree(alone)
    return outcomes


def _report(outcome: Outcome) -> None:
    print(
        f"{'FAILED ' + outcome.problem if outcome.problem else 'same'}: "
        f"{outcome.processes} processes, {outcome.job}; "
        f"{', '.join(outcome.disturbances)}; ended {outcome.statuses}",
        flush=True,
    )


def _disturbed_run(job, config, generator, folder) -> Outcome:
    from benchmarks.chaos.disturbances import KINDS, Disturbed

    outcome = Outcome(job.parts(), job.processes, [], [], "")
    checkpoints = folder / "checkpoints"
    kinds = [generator.choice(KINDS) for _ in range(generator.randint(1, 3))]
    for start in range(_STARTS):
        running = _start(job, folder, True, config)
        disturbance = None
        if start < len(kinds):
            # Past the start, and some saves on.
            number = _newest(checkpoints) + generator.randint(1, 13)
            running.until(checkpoints, number, generator.uniform(5.0, 60.0))
            time.sleep(generator.uniform(0.0, 0.1))
            if running.is_alive():
                kind = kinds[start]
                outcome.disturbances.append(kind)
                disturbance = Disturbed(
                    kind, checkpoints, generator, config.stop_seconds
                )
                disturbance.strike(running.pid(generator))
        statuses = running.wait(config.job_seconds)
        outcome.statuses.append(max(statuses, key=lambda s: s != 0))
        if disturbance is not None:
            disturbance.aftermath()
        if set(statuses) == {0}:
            return outcome
        unexpected = [s for s in statuses if s not in _EXPECTED]
        if unexpected:
            outcome.problem = f"ended with {unexpected}"
            return outcome
        if "None of the checkpoints" in _last_line(folder):
            # The only one was damaged: said, and begun anew by the user.
            shutil.rmtree(checkpoints)
    outcome.problem = f"did not end in {_STARTS} starts"
    return outcome


class _Running:
    """The processes of one start of a job."""

    def __init__(self, processes):
        self._processes = processes

    def is_alive(self) -> bool:
        return all(each.is_alive() for each in self._processes)

    def pid(self, generator: random.Random) -> int:
        return generator.choice(self._processes).pid

    def until(
        self, checkpoints: pathlib.Path, number: int, seconds: float
    ) -> None:
        """Returns when that checkpoint is there, or some time has passed."""
        end = time.monotonic() + seconds
        while self.is_alive() and _newest(checkpoints) < number:
            if time.monotonic() > end:
                return
            time.sleep(0.002)

    def wait(self, seconds: float) -> list[int | None]:
        """Their exit statuses; None for one that hung, and was killed."""
        end = time.monotonic() + seconds
        statuses = []
        for each in self._processes:
            each.join(max(end - time.monotonic(), 0.1))
            statuses.append(each.exitcode)
            if each.is_alive():
                each.kill()
                each.join()
        return statuses


def _start(job, folder, saves, config) -> _Running:
    from benchmarks.chaos.job import program as trains

    folder.mkdir(parents=True, exist_ok=True)
    addresses = []
    if job.processes > 1:
        addresses = [f"127.0.0.1:{_free_port()}" for _ in range(job.processes)]
    started = [
        _processes.Process(
            target=trains, args=(job, folder, saves, worker, addresses)
        )
        for worker in range(job.processes)
    ]
    for each in started:
        each.start()
    return _Running(started)


def _newest(checkpoints: pathlib.Path) -> int:
    numbers = [
        int(path.stem.partition("-")[2])
        for path in checkpoints.glob("ckpt-*.index")
    ]
    return max(numbers, default=0)


def _difference(alone: pathlib.Path, disturbed: pathlib.Path) -> str:
    """What is not the same bits; "" where all is."""
    import h5py
    import numpy as np

    with (
        np.load(alone / "final.npz") as one,
        np.load(disturbed / "final.npz") as other,
    ):
        for name in one.files:
            if not np.array_equal(one[name], other[name], equal_nan=True):
                return f"variable {name} differs"
    best = "best.weights.h5"
    if (alone / best).exists() != (disturbed / best).exists():
        return "one has no best file"
    if not (alone / best).exists():
        return ""
    found: list[dict[str, bytes]] = [{}, {}]
    for values, folder in zip(found, (alone, disturbed), strict=True):
        with h5py.File(folder / best) as file:
            file.visititems(
                lambda name, item, values=values: (
                    values.update({name: item[()].tobytes()})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
    return "" if found[0] == found[1] else "the best file differs"


def _last_line(folder: pathlib.Path) -> str:
    lines = (folder / "errors-0.txt").read_text(errors="replace").splitlines()
    return next((x for x in reversed(lines) if x.startswith("tfamp: ")), "")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _print_table(outcomes: list[Outcome]) -> None:
    runs: collections.Counter = collections.Counter()
    right: collections.Counter = collections.Counter()
    for outcome in outcomes:
        for kind in [*set(outcome.disturbances), "all"]:
            runs[kind, outcome.processes] += 1
            right[kind, outcome.processes] += not outcome.problem
    print("\n| disturbance | processes | runs | the same bits |")
    print("|:--|--:|--:|--:|")
    for kind, processes in sorted(runs):
        key = (kind, processes)
        print(f"| {kind} | {processes} | {runs[key]} | {right[key]} |")


# TensorFlow is imported once; each process is a fork of that.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["benchmarks.chaos.job"])

if __name__ == "__main__":
    sys.exit(program.run(Config, main, __doc__ or "", sys.argv[1:]))
