"""What a step costs in this checkout, as a ratio to another checkout.

    python -m benchmarks.checkouts --before=FOLDER [--cases=mlp,unet]

For each case two processes train the same model by `tfamp.fit`, one with the
package of FOLDER, in turns of some steps, each second round the other way
round. Ratios are taken round by round: what drifts touches both alike. A new
pair of processes lays out its memory anew, which alone moves a step by some
percent: several pairs are measured. Each process computes on one core.
Printed are medians, with quartiles of the ratios.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from benchmarks.program import check_known, run
from tfamp.errors import InputError, JobError
from tfamp.precision.policy import PRECISIONS
from tfamp.recipe.flags import check_ranges, flag

HERE = pathlib.Path(__file__).resolve().parents[2]
_TRAINEE = pathlib.Path(__file__).with_name("trainee.py")
# Steps of a turn: a second or so.
STEPS = {
    "mlp": 1500,
    "mlp_wide": 300,
    "masked": 300,
    "unet": 40,
    "gpt4": 30,
    "resnet50": 6,
}
_WARM_UP = 2
_SECONDS_TO_END = 20


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    before: str = flag("", "the other checkout, with its own tfamp")
    cases: tuple[str, ...] = flag((), f"some of {', '.join(STEPS)}; all if ''")
    precisions: tuple[str, ...] = flag(("mixed_bfloat16",), "in which")
    pairs: int = flag(2, "of processes, of each case", minimum=1)
    rounds: int = flag(16, "turns of each process", minimum=2)
    steps: int = flag(0, "of a turn; 0 for what takes a second", minimum=0)

    def __post_init__(self):
        check_ranges(self)
        check_known(self.cases, STEPS)
        check_known(self.precisions, PRECISIONS)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a step of one turn took.

    Attributes:
        cpu: milliseconds that the process computed.
        wall: milliseconds.
    """

    cpu: float
    wall: float


def main(argv: Sequence[str]) -> int:
    """The program: flags in, a table and an exit status out."""
    return run(Config, measure, __doc__, argv)


def measure(config: Config) -> None:
    """Measures case by case, and prints a row for each."""
    before = pathlib.Path(config.before).expanduser().resolve()
    if not config.before or not (before / "tfamp" / "__init__.py").is_file():
        raise InputError(
            f"--before={config.before!r} is no checkout of tfamp; expected a "
            "folder that holds tfamp/ and benchmarks/."
        )
    print("| case | precision | before, ms | after, ms | CPU | time |")
    print("|---|---|--:|--:|--:|--:|", flush=True)
    for case in config.cases or STEPS:
        for precision in config.precisions:
            job = [case, precision, str(config.steps or STEPS[case])]
            rounds = [
                each
                for _ in range(config.pairs)
                for each in _race((before, HERE), job, config.rounds)
            ]
            old, new = (
                statistics.median(turns[i].cpu for turns in rounds)
                for i in range(2)
            )
            cpu = _ratio([b.cpu / a.cpu for a, b in rounds])
            wall = _ratio([b.wall / a.wall for a, b in rounds])
            print(
                f"| {case} | {precision} | {old:.3g} | {new:.3g} | {cpu} "
                f"| {wall} |",
                flush=True,
            )


def _ratio(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, method="inclusive")
    return f"{middle:.3f} ({low:.2f} to {high:.2f})"


def _race(
    checkouts: Sequence[pathlib.Path], job: list[str], rounds: int
) -> Iterator[tuple[Turn, ...]]:
    """The turns of each round, in the order of the checkouts."""
    with contextlib.ExitStack() as stack:
        turns_of = [
            stack.enter_context(_trainee(folder, job)) for folder in checkouts
        ]
        for number in range(_WARM_UP + rounds):
            order = range(len(checkouts))[:: 1 if number % 2 else -1]
            turns = {i: turns_of[i]() for i in order}
            if number >= _WARM_UP:
                yield tuple(turns[i] for i in sorted(turns))


@contextlib.contextmanager
def _trainee(
    checkout: pathlib.Path, job: list[str]
) -> Iterator[Callable[[], Turn]]:
    """A process that trains by the package of a checkout; its next turn."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, str(_TRAINEE), str(checkout), *job],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {"PYTHONPATH": str(checkout)},
        ) as process,
    ):

        def turn() -> Turn:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(b"go\n")
            if line := process.stdout.readline():
                return Turn(**json.loads(line))
            status = process.wait(_SECONDS_TO_END)
            log.seek(0)
            last = log.read().decode().strip().rpartition("\n")[2]
            raise JobError(
                f"{checkout}, {', '.join(job)}: ended with status {status}: "
                f"{last}",
                status,
                last,
            )

        try:
            yield turn
        finally:
            process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
