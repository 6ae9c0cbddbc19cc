"""tfamp, stock Keras and PyTorch train the same models; who is how fast?

    python -m benchmarks.compare --output_dir=DIR
    python -m benchmarks.compare --quick

Same networks, same weights to begin with, same optimizer, same data in memory.
Each contestant has a process of its own; they train in turns, round by round,
and whoever waits stands still. Printed, and left in DIR as compare.json,
compare.md and compare.svg, are medians over rounds, with the lowest and the
highest, ratios taken round by round, peak memory, and what proves that all
trained one model: weights, operations, the losses of the first epochs. Where
these disagree, or a contestant fails, the exit status is 1.

PyTorch is the extra `torch`.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, Literal

from benchmarks.compare import cases, frameworks, measuring, plot, tables
from benchmarks.compare.contestants import CONTESTANTS, choose
from benchmarks.compare.cores import count_cores
from benchmarks.compare.turns import Schedule
from benchmarks.program import run
from tfamp.analysis.page.plots import require_matplotlib
from tfamp.errors import InputError, JobError
from tfamp.files import console
from tfamp.files.output import make_folder, output_folder, write_atomically
from tfamp.precision.policy import PRECISIONS
from tfamp.recipe.flags import check_ranges, flag

_QUICK_MODELS = ("gpt4", "mlp")
_QUICK_CONTESTANTS = ("keras", "tfamp", "torch")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    device: Literal["cpu", "gpu"] = flag("cpu", "what to train on")
    models: tuple[str, ...] = flag(
        (), f"some of {', '.join(c.name for c in cases.FULL)}; all if empty"
    )
    contestants: tuple[str, ...] = flag(
        (), f"some of {', '.join(c.name for c in CONTESTANTS)}; all if empty"
    )
    precisions: tuple[str, ...] = flag(
        (),
        "some of float32, mixed_bfloat16, mixed_float16; all if empty, the "
        "last on a GPU only",
    )
    rounds: int | None = flag(
        None, "turns of each contestant; 5, with --quick 2", minimum=1
    )
    threads: int = flag(
        0, "cores that each contestant may use; 0 for all", minimum=0
    )
    quick: bool = flag(
        False,
        "a look in a minute or two: small models, where none are named two of "
        "them and three contestants, few rounds; no figures to quote",
    )
    output_dir: str = flag("", "folder for the results; none if empty")

    def __post_init__(self):
        check_ranges(self)


def main(argv: Sequence[str]) -> int:
    """The program: flags in, tables and an exit status out.

    Args:
        argv: the arguments after the program's name.

    Returns:
        0; 2 for bad input, 1 where a contestant failed or trained another
        model, both with one line on stderr.
    """
    return run(Config, compare, __doc__, argv)


def compare(config: Config) -> dict[str, Any]:
    """Measures, prints the tables, and writes them.

    Args:
        config: the flags.

    Returns:
        What `compare.json` holds.

    Raises:
        InputError: for a flag that cannot be used.
        JobError: a contestant failed, or trained another model; what was
            measured is written all the same.
    """
    plan = make_plan(config)
    folder = None
    if config.output_dir:
        require_matplotlib()
        folder = output_folder(config.output_dir)
    frameworks.check(plan.contestants, plan.device)
    if folder:
        make_folder(folder)

    def keep(record: dict[str, Any]) -> None:
        if folder:
            _write(record, folder)

    scratch = pathlib.Path(tempfile.mkdtemp(prefix="tfamp-compare-"))
    try:
        record = measuring.measure(plan, scratch, keep)
    finally:
        # What stays after a failure are the logs.
        for weights in scratch.glob("*.npz"):
            weights.unlink()
    console.print_text(*map(console.filled, tables.tables(record)))
    complaint = measuring.complaint(record)
    if complaint:
        raise JobError(complaint, status=None, last_line=complaint)
    shutil.rmtree(scratch)
    return record


def make_plan(config: Config) -> measuring.Plan:
    """What the flags ask for.

    Raises:
        InputError: a name is not known, or there are not so many cores.
    """
    threads = count_cores(config.threads)
    for name in config.precisions:
        if name not in PRECISIONS or config.precisions.count(name) > 1:
            raise InputError(
                f"precisions={','.join(config.precisions)}; expected some of "
                f"{', '.join(PRECISIONS)}, each once."
            )
    default = PRECISIONS if config.device == "gpu" else PRECISIONS[:2]
    models, contestants = config.models, config.contestants
    if config.quick:
        models = models or _QUICK_MODELS
        contestants = contestants or _QUICK_CONTESTANTS
    rounds = config.rounds or (2 if config.quick else 5)
    return measuring.Plan(
        cases=choose(
            models, cases.QUICK if config.quick else cases.FULL, "model"
        ),
        contestants=choose(contestants, CONTESTANTS, "contestant"),
        precisions=config.precisions or default,
        device=config.device,
        threads=threads,
        schedule=Schedule(rounds, timed_epochs=1 if config.quick else 2),
        quick=config.quick,
        # Compile times are not quick's to tell.
        starts_at_once=threads if config.quick else 1,
    )


def _write(record: dict[str, Any], folder: pathlib.Path) -> None:
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "compare.json", text)
    write_atomically(folder / "compare.md", tables.to_markdown(record))
    write_atomically(folder / "compare.svg", plot.step_times(record))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
