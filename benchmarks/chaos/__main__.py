"""Disturbs jobs at random moments, and compares how they end.

    python -m benchmarks.chaos --runs=12 --seed=0 --output_dir=runs/chaos

Each job is made of random parts, and trained once without a disturbance. Then
it is started again and again, disturbed, and started until it ends by itself.
Final weights, optimizer and the best file of `ModelCheckpoint` must be those of
the first, bit for bit, each process must end by itself, and with a status that
fits. Prints a line for each run and a Markdown table, and leaves `runs.jsonl`
and the folders of runs that ended otherwise. A run takes about 15 seconds of a
core; hours of it are `--runs=1000`.
"""

import collections
import concurrent.futures
import dataclasses
import io
import json
import math
import pathlib
import random
import shutil
import signal
import sys
import threading
import time
import zipfile

import tfamp
from benchmarks import program
from tfamp.recipe import flag

_STARTS = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    runs: int = flag(12, "disturbed runs; 1000 take hours")
    minutes: float = flag(0.0, "after which no run is begun; 0 for no end")
    per_job: int = flag(4, "disturbed runs of each job")
    at_once: int = flag(2, "jobs at the same time; most of it is waiting")
    processes: tuple[str, ...] = flag(
        ("1", "1", "2", "3"), "processes of a job, drawn from these"
    )
    stop_seconds: float = flag(60.0, "how long SIGSTOP lasts")
    job_seconds: float = flag(300.0, "after which a process counts as hung")
    seed: int = flag(0, "of all that is random")
    output_dir: str = flag(
        "", "new folder; of runs that ended right none stays"
    )


@dataclasses.dataclass
class Outcome:
    """How a disturbed run went.

    Attributes:
        seconds: from each disturbance to the end of all processes.
    """

    job: str
    processes: int
    disturbances: list[str]
    statuses: list[list[int | None]]
    seconds: list[float]
    problem: str


def main(config: Config) -> list[Outcome]:
    """Runs them all; returns how each went."""
    folder = pathlib.Path(config.output_dir or ".")
    if not config.output_dir or folder.exists():
        raise tfamp.InputError(
            f"output_dir={config.output_dir!r}; expected the name of a folder "
            "that does not exist yet."
        )
    counts = [config.per_job] * (config.runs // config.per_job)
    counts += [config.runs % config.per_job] * (sum(counts) < config.runs)
    end = time.monotonic() + 60 * config.minutes if config.minutes else math.inf
    outcomes: list[Outcome] = []
    with concurrent.futures.ThreadPoolExecutor(config.at_once) as pool:
        for of_job in pool.map(
            lambda job: _runs_of_job(config, folder, end, *job),
            enumerate(counts),
        ):
            outcomes += of_job
    print_table(outcomes)
    return outcomes


def _runs_of_job(config, folder, end, number, count) -> list[Outcome]:
    from benchmarks.chaos.job import draw
    from benchmarks.chaos.running import Running

    generator = random.Random(f"{config.seed}/{number}")
    job = draw(generator, int(generator.choice(config.processes)))
    alone = folder / f"alone-{number}"
    outcomes: list[Outcome] = []
    if time.monotonic() > end:
        return outcomes
    statuses = Running(job, alone, False).wait(config.job_seconds)
    if set(statuses) != {0}:
        problem = f"undisturbed: {statuses}"
        outcomes = [Outcome(job.parts(), job.processes, [], [], [], problem)]
        _report(folder, outcomes[0])
        return outcomes
    while len(outcomes) < count and time.monotonic() < end:
        disturbed = folder / f"disturbed-{number}-{len(outcomes)}"
        outcome = _disturbed_run(job, config, generator, disturbed)
        outcome.problem = outcome.problem or _difference(alone, disturbed)
        outcomes.append(outcome)
        _report(folder, outcome)
        if not outcome.problem:
            shutil.rmtree(disturbed)
    shutil.rmtree(alone)
    return outcomes


_printing = threading.Lock()


def _report(folder: pathlib.Path, outcome: Outcome) -> None:
    with _printing:
        print(
            f"{'FAILED ' + outcome.problem if outcome.problem else 'same'}: "
            f"{outcome.processes} processes, {outcome.job}; "
            f"{', '.join(outcome.disturbances)}; ended {outcome.statuses} "
            f"after {[round(each, 1) for each in outcome.seconds]} s",
            flush=True,
        )
        with open(folder / "runs.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")


def _disturbed_run(job, config, generator, folder) -> Outcome:
    from benchmarks.chaos.disturbances import KINDS, Disturbed
    from benchmarks.chaos.running import Running, newest

    outcome = Outcome(job.parts(), job.processes, [], [], [], "")
    checkpoints = folder / "checkpoints"
    kinds = [generator.choice(KINDS) for _ in range(generator.randint(1, 2))]
    for start in range(_STARTS):
        running = Running(job, folder, True)
        disturbance = kind = None
        if start < len(kinds):
            # At the start, or past it and some saves on.
            number = newest(checkpoints) + generator.randint(1, 13)
            running.until(checkpoints, number, generator.uniform(1.0, 60.0))
            time.sleep(generator.uniform(0.0, 0.1))
            if running.is_alive():
                kind = kinds[start]
                outcome.disturbances.append(kind)
                disturbance = Disturbed(
                    kind, checkpoints, generator, config.stop_seconds
                )
                disturbance.strike(running.pid(generator))
        begin = time.monotonic()
        statuses = running.wait(config.job_seconds)
        outcome.statuses.append(statuses)
        if disturbance is not None:
            outcome.seconds.append(time.monotonic() - begin)
            disturbance.aftermath()
        if set(statuses) == {0}:
            return outcome
        if "None of the checkpoints" in _last_line(folder):
            # The only one was damaged: said, and begun anew by the user.
            shutil.rmtree(checkpoints)
        elif _unexpected(statuses, kind, folder):
            outcome.problem = f"ended with {statuses}"
            return outcome
    outcome.problem = f"did not end in {_STARTS} starts"
    return outcome


def _unexpected(statuses, kind, folder) -> list[int | None]:
    from benchmarks.chaos.disturbances import statuses_after
    from benchmarks.chaos.job import begun

    return [
        status
        for worker, status in enumerate(statuses)
        if status not in statuses_after(kind)
        # SIGTERM is what it is until fit is called.
        and (status != -signal.SIGTERM or (folder / begun(worker)).exists())
    ]


def _difference(alone: pathlib.Path, disturbed: pathlib.Path) -> str:
    """What is not the same bits; "" where all is."""
    import h5py
    import numpy as np

    from benchmarks.chaos.job import BEST

    with (
        np.load(alone / "final.npz") as one,
        np.load(disturbed / "final.npz") as other,
    ):
        for name in one.files:
            if not np.array_equal(one[name], other[name], equal_nan=True):
                return f"variable {name} differs"
    found = []
    for folder in (alone, disturbed):
        if not (folder / BEST).exists():
            found.append({})
            continue
        with zipfile.ZipFile(folder / BEST) as archive:
            weights = archive.read("model.weights.h5")
        values: dict[str, bytes] = {}
        with h5py.File(io.BytesIO(weights)) as file:
            file.visititems(
                lambda name, item, values=values: (
                    values.update({name: item[()].tobytes()})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
        found.append(values)
    return "" if found[0] == found[1] else "the best file differs"


def _last_line(folder: pathlib.Path) -> str:
    lines = (folder / "errors-0.txt").read_text(errors="replace").splitlines()
    return next((x for x in reversed(lines) if x.startswith("tfamp: ")), "")


def print_table(outcomes: list[Outcome]) -> None:
    """Of each disturbance: how many runs had it, and how many were right."""
    runs: collections.Counter = collections.Counter()
    right: collections.Counter = collections.Counter()
    longest: dict[tuple[str, int], float] = {}
    for outcome in outcomes:
        for kind in [*set(outcome.disturbances), "all"]:
            runs[kind, outcome.processes] += 1
            right[kind, outcome.processes] += not outcome.problem
        for kind, seconds in zip(
            outcome.disturbances, outcome.seconds, strict=True
        ):
            key = (kind, outcome.processes)
            longest[key] = max(longest.get(key, 0.0), seconds)
    print(
        "\n| disturbance | processes | runs | the same bits | ended after at "
        "most |\n|:--|--:|--:|--:|--:|"
    )
    for key in sorted(runs):
        seconds = f"{longest[key]:.0f} s" if key in longest else ""
        print(
            f"| {key[0]} | {key[1]} | {runs[key]} | {right[key]} | {seconds} |"
        )


if __name__ == "__main__":
    sys.exit(program.run(Config, main, __doc__ or "", sys.argv[1:]))
