"""Is mixed precision faster than float32, and smaller? The runs.

Each precision trains the recipe in a process of its own, A B C, A B C, so that
what the machine does in the meantime touches all of them. What comes of it
is in `tfamp.analysis.bench.record`.
"""

import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

from tfamp.analysis.bench import record as bench_record
from tfamp.analysis.bench.figures import BASE
from tfamp.analysis.bench.largest import search
from tfamp.analysis.bench.memory import resident_bytes
from tfamp.analysis.bench.plan import Plan
from tfamp.analysis.bench.run import OUT_OF_MEMORY, RESERVED, run_config
from tfamp.analysis.jobs.queue import Job, run_jobs
from tfamp.errors import InputError, JobError
from tfamp.files.output import make_folder, output_folder, write_atomically
from tfamp.hardware.devices import GIB, Hardware, detect_hardware
from tfamp.recipe import load_recipe
from tfamp.recipe.flags import check_not_reserved

FILE_NAME = "bench.json"

# From it, float32 products may be rounded to TF32 on the matrix units.
_FIRST_WITH_TF32 = (8, 0)
_KILLED = 128 + 9


@dataclasses.dataclass(frozen=True)
class Series:
    """One row of the comparison.

    Attributes:
        name: the precision; "float32_tf32_off".
        precision: that the recipe trains in.
        tf32: "on" or "off" for float32 on a device that has it, else "".
    """

    name: str
    precision: str
    tf32: str = ""


def measure(plan: Plan, output_dir: str | os.PathLike) -> dict[str, Any]:
    """Does all runs, and writes `bench.json`.

    Nothing that was measured before is used again.

    Args:
        plan: what to measure.
        output_dir: a local folder; made where it is missing.

    Returns:
        What `bench.json` holds.

    Raises:
        InputError: the recipe, a setting or the folder cannot be used.
        JobError: a run failed.
    """
    folder = output_folder(output_dir)
    _check_settings(plan)
    hardware = detect_hardware()
    _check_memory_limit(plan, hardware)
    series = make_series(plan.precisions, hardware)
    make_folder(folder)
    with tempfile.TemporaryDirectory() as results:
        make = _JobMaker(plan, pathlib.Path(results), folder)
        runs = _in_rounds(plan, series, make)
        record = bench_record.make(plan, runs, hardware)
        if plan.largest_batch:
            record["largest_batches"] = {
                each.name: _largest_batch(each, make, runs[0])
                for each in series
            }
        if plan.profile:
            run_jobs([make.trace(each) for each in series])
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / FILE_NAME, text)
    return record


def make_series(
    precisions: tuple[str, ...], hardware: Hardware
) -> list[Series]:
    """The rows of the comparison, float32 first."""
    has_tf32 = (hardware.compute_capability or (0, 0)) >= _FIRST_WITH_TF32
    base = Series("float32", "float32", "on" if has_tf32 else "")
    off = [Series("float32_tf32_off", "float32", "off")] if has_tf32 else []
    others = [Series(p, p) for p in precisions if p != base.name]
    return [base, *off, *others]


def _check_settings(plan: Plan) -> None:
    """Finds what is wrong with them before the first process starts."""
    check_not_reserved(plan.settings, RESERVED, ("precisions",))
    run_config(load_recipe(plan.recipe).Config, plan.settings, "float32")


def _check_memory_limit(plan: Plan, hardware: Hardware) -> None:
    limit, memory = plan.memory_limit_bytes, hardware.memory_bytes
    if not plan.largest_batch:
        return
    if hardware.kind != "cpu" and limit is not None:
        raise InputError(
            f"memory_limit_gib={plan.memory_limit_gib:g} is for CPUs; a "
            f"{hardware.kind.upper()} has a limit of its own: leave it out."
        )
    if hardware.kind == "cpu" and limit is None:
        raise InputError(
            "On a CPU the largest batch is limited by memory that other "
            "programs use too; say how much it may take with "
            "--memory_limit_gib."
        )
    if limit is not None and resident_bytes() is None:
        raise InputError(
            "--memory_limit_gib: this system does not tell how much memory a "
            "process has, so no search can keep to a limit; run it on Linux."
        )
    if limit is not None and memory is not None and limit > memory:
        raise InputError(
            f"memory_limit_gib={plan.memory_limit_gib:g} is more than the "
            f"{memory / GIB:.1f} GiB of this machine."
        )


def _in_rounds(plan, series, make) -> list[dict[str, Any]]:
    planned = [
        (number, each)
        for number in range(1, plan.rounds + 1)
        for each in series
    ]
    results = run_jobs([make.timing(each, number) for number, each in planned])
    return [
        {"name": each.name, "round": number, **result}
        for (number, each), result in zip(planned, results, strict=True)
    ]


def _largest_batch(series, make, run) -> dict[str, Any]:
    def fits(rows: int) -> bool:
        (outcome,) = run_jobs([make.trial(series, rows)], return_failures=True)
        if not isinstance(outcome, JobError):
            return True
        # The system kills what takes the last of the host's memory.
        if outcome.status in (OUT_OF_MEMORY, _KILLED):
            return False
        raise outcome

    found = search(fits, start=run["batch_size"], multiple=run["replicas"])
    return dataclasses.asdict(found)


@dataclasses.dataclass(frozen=True)
class _JobMaker:
    """Makes the processes of a plan: `bench_run` with its arguments."""

    plan: Plan
    results: pathlib.Path
    folder: pathlib.Path

    def timing(self, series: Series, number: int) -> Job:
        is_first = number == 1 and series.name == BASE
        options = [f"--steps={self.plan.steps}"]
        options += ["--count_flops"] if is_first else []
        return self._job(
            f"{series.name}-round{number}", series, options, series.name
        )

    def trial(self, series: Series, rows: int) -> Job:
        options = [f"--rows={rows}"]
        limit = self.plan.memory_limit_bytes
        options += [] if limit is None else [f"--memory_limit={limit}"]
        return self._job(f"{series.name}-batch{rows}", series, options, "trial")

    def trace(self, series: Series) -> Job:
        folder = self.folder / "profile" / series.name
        return self._job(
            f"{series.name}-profile", series, [f"--trace={folder}"], "profile"
        )

    def _job(self, name, series, options, kind) -> Job:
        return Job(
            name=name,
            arguments=(
                *("-m", "tfamp.analysis.bench.run", self.plan.recipe),
                f"--precision={series.precision}",
                *([f"--tf32={series.tf32}"] if series.tf32 else []),
                *options,
                *(
                    f"--config.{field}={text}"
                    for field, text in self.plan.settings.items()
                ),
            ),
            result=self.results / f"{name}.json",
            log=self.folder / "logs" / f"{name}.log",
            kind=kind,
        )
