"""How the cost of a step of `tfamp.fit` grows, one thing at a time.

    python -m benchmarks.scaling --output_dir=DIR

Layers of a GPT, batch, microbatches, variables, replicas and workers, and the
loop itself around an almost empty step, beside stock Keras and a bare
`tf.function`. Each series has a process of its own, in each of several rounds.
Printed, and left in DIR as scaling.json, scaling.md and scaling.svg, are the
medians over rounds. On a CPU; replicas and workers share its cores, so that
what they add is what sharing costs.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.compare.contestants import choose
from benchmarks.compare.cores import count_cores
from benchmarks.program import run
from benchmarks.scaling import page
from benchmarks.scaling.series import SERIES, Series
from tfamp.analysis.bench.figures import spread
from tfamp.analysis.jobs.queue import Job, run_jobs
from tfamp.analysis.page.plots import require_matplotlib
from tfamp.files import console
from tfamp.files.output import make_folder, output_folder, write_atomically
from tfamp.precision.policy import resolve_precision
from tfamp.recipe.flags import check_ranges, flag

SCHEMA = "tfamp.scaling/1"


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    series: tuple[str, ...] = flag(
        (), f"some of {', '.join(s.name for s in SERIES)}; all if empty"
    )
    precision: str = flag("float32", "of the models")
    rounds: int = flag(3, "how often each series is measured", minimum=1)
    threads: int = flag(0, "cores to use; 0 for all", minimum=0)
    quick: bool = flag(
        False, "two values of each series, few steps, one round: to see it run"
    )
    output_dir: str = flag("", "folder for the results; none if empty")

    def __post_init__(self):
        check_ranges(self)


def main(argv: Sequence[str]) -> int:
    """The program: flags in, tables and an exit status out.

    Args:
        argv: the arguments after the program's name.

    Returns:
        0; 2 for bad input and 1 for a failed process, both with one line on
        stderr.
    """
    return run(Config, measure, __doc__, argv)


def measure(config: Config) -> dict[str, Any]:
    """Measures, prints the tables, and writes them.

    Args:
        config: the flags.

    Returns:
        What `scaling.json` holds: `schema`, `quick`, `precision`, `threads`,
        `rounds`, `environment`; `points`: `series`, `variant`, `value`,
        `parameters` and the spread over rounds of `step_milliseconds`; and
        `lines`: of each series that one describes `fixed_milliseconds` and
        `unit_milliseconds`.

    Raises:
        InputError: for a flag that cannot be used.
        JobError: a process failed.
    """
    chosen = choose(config.series, SERIES, "series")
    resolve_precision(config.precision)
    threads = count_cores(config.threads)
    folder = None
    if config.output_dir:
        require_matplotlib()
        folder = output_folder(config.output_dir)
        make_folder(folder)
    if config.quick:
        config = dataclasses.replace(config, rounds=1)
        chosen = [_shortened(each) for each in chosen]
    with tempfile.TemporaryDirectory(prefix="tfamp-scaling-") as scratch:
        planned = [
            (series, job)
            for number in range(1, config.rounds + 1)
            for series in chosen
            for job in _jobs(
                series, number, config, threads, pathlib.Path(scratch)
            )
        ]
        results = run_jobs([job for _, job in planned])
    points = summarize(
        [
            {"series": series.name, **point}
            for (series, _), result in zip(planned, results, strict=True)
            for point in result["points"]
        ]
    )
    # Imports TensorFlow, which a bad flag need not wait for.
    from tfamp.analysis.page import environment

    command = ["python", "-m", "benchmarks.scaling", *sys.argv[1:]]
    record = {
        "schema": SCHEMA,
        "quick": config.quick,
        "precision": config.precision,
        "threads": threads,
        "rounds": config.rounds,
        "environment": environment.describe(command),
        "points": points,
        "lines": lines_through(points, chosen),
    }
    console.print_text(*map(console.filled, page.tables(record)))
    if folder:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        write_atomically(folder / "scaling.json", text)
        write_atomically(folder / "scaling.md", page.to_markdown(record))
        write_atomically(folder / "scaling.svg", page.plot(record))
    return record


def summarize(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of all rounds as one of each, with the spread of its times."""
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for point in points:
        key = (point["series"], point["value"], point["variant"])
        groups.setdefault(key, []).append(point)
    return [
        {
            "series": series,
            "value": value,
            "variant": variant,
            "parameters": same[0]["parameters"],
            "step_milliseconds": spread([p["step_milliseconds"] for p in same]),
        }
        for (series, value, variant), same in groups.items()
    ]


def lines_through(
    points: Sequence[Mapping[str, Any]], chosen: Sequence[Series]
) -> list[dict[str, Any]]:
    """The least-squares line through the medians of each series and variant.

    Args:
        points: as `summarize` makes them.
        chosen: the series; those that no line describes are left out.
    """
    found = []
    for series in chosen:
        for variant in series.variants if series.is_line else ():
            these = [
                point
                for point in points
                if (point["series"], point["variant"]) == (series.name, variant)
            ]
            unit, fixed = np.polyfit(
                [point["value"] for point in these],
                [point["step_milliseconds"]["median"] for point in these],
                deg=1,
            )
            found.append(
                {
                    "series": series.name,
                    "variant": variant,
                    "fixed_milliseconds": float(fixed),
                    "unit_milliseconds": float(unit),
                }
            )
    return found


def _shortened(series: Series) -> Series:
    return dataclasses.replace(
        series, values=series.values[:2], steps=max(series.steps // 10, 2)
    )


def _jobs(series, number, config, threads, scratch) -> list[Job]:
    """The processes of a series in one round."""
    groups = (
        [(value,) for value in series.values]
        if series.own_processes
        else [series.values]
    )
    return [
        _job(series, values, number, config, threads, scratch)
        for values in groups
    ]


def _job(series, values, number, config, threads, scratch) -> Job:
    program = ("-m", "benchmarks.scaling.points")
    if series.name == "workers":
        launch = ("-m", "tfamp.launch", f"--workers={values[0]}")
        program = (*launch, program[1], "--")
    text = ",".join(map(str, values))
    name = f"{series.name}-{text}-round{number}"
    return Job(
        name=name,
        arguments=(
            *program,
            f"--series={series.name}",
            f"--values={text}",
            f"--precision={config.precision}",
            f"--steps={series.steps}",
            f"--threads={threads}",
        ),
        result=scratch / f"{name}.json",
        log=scratch / "logs" / f"{name}.log",
        kind=f"{series.name}-{text}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
