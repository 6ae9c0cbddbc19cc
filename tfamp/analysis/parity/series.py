"""Does mixed precision give the result that float32 gives? The runs.

Each precision trains the recipe with the same seeds: equal initial weights,
equal data in equal order, equal budget. A run is a process of its own, in
`OUTPUT_DIR/runs/PRECISION-seedN`. Finished runs are kept, so that a series
goes on where it was stopped, and more seeds or precisions can be added. What
comes of it is in `tfamp.analysis.parity.record`.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from tfamp.analysis.jobs.queue import Job, run_jobs
from tfamp.analysis.page import environment
from tfamp.analysis.parity import record as parity_record
from tfamp.analysis.parity.final_metric import choose_metric
from tfamp.analysis.parity.question import REFERENCE, Question
from tfamp.analysis.parity.run import run_config
from tfamp.files.output import make_folder, output_folder, write_atomically
from tfamp.precision import maps
from tfamp.recipe import load_recipe

FILE_NAME = "parity.json"


def measure(
    question: Question, output_dir: str | os.PathLike
) -> dict[str, Any]:
    """Does the runs that are missing, and writes `parity.json`.

    Args:
        question: what to run, and how to judge it.
        output_dir: a local folder; made where it is missing.

    Returns:
        What `parity.json` holds: see `tfamp.analysis.parity.record`.

    Raises:
        InputError: the recipe, the metric or the folder cannot be used.
        JobError: a run ended in a way that is no result.
    """
    folder = output_folder(output_dir)
    surroundings = environment.describe()
    jobs = make_jobs(question, folder, surroundings["versions"])
    make_folder(folder)

    def check(job: Job, run: dict[str, Any]) -> None:
        del job
        # A run that failed has no metrics, and is a result all the same.
        if run["status"] == "finished":
            choose_metric(run["metrics"], question.metric)

    runs = run_jobs(jobs, check=check)
    record = parity_record.make(
        runs,
        config=_config_of(question),
        question=question,
        environment=surroundings,
    )
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / FILE_NAME, text)
    return record


def make_jobs(
    question: Question,
    folder: pathlib.Path,
    versions: Mapping[str, str | None],
) -> list[Job]:
    """The runs, in their order: all precisions of a seed, then the next seed.

    So a series that is stopped early has something to compare, and the first
    runs tell how long the others will take.

    Args:
        question: what to run.
        folder: for the runs.
        versions: of packages. A run of other ones is not taken for these.

    Raises:
        InputError: the recipe or a setting cannot be used.
    """
    _config_of(question)
    settings = [
        f"--config.{name}={text}"
        for name, text in sorted(question.settings.items())
    ]
    depends_on = {
        "the recipe's file (SHA-256)": _digest(question.recipe),
        **{
            name: str(versions[name])
            for name in ("keras", "tensorflow", "tfamp")
        },
    }
    jobs = []
    for seed in range(question.seeds):
        for precision in (REFERENCE, *question.others):
            name = f"{_folder_name(precision)}-seed{seed}"
            run_folder = folder / "runs" / name
            jobs.append(
                Job(
                    name,
                    (
                        *("-m", "tfamp.analysis.parity.run", question.recipe),
                        *(f"--precision={precision}", f"--seed={seed}"),
                        *settings,
                    ),
                    result=run_folder / "result.json",
                    log=run_folder / "log.txt",
                    depends_on=depends_on | _content(precision),
                    kind=precision,
                )
            )
    return jobs


def _folder_name(precision):
    if not maps.is_map(precision):
        return precision
    path = pathlib.Path(precision)
    return "-".join(re.findall(r"[\w.]+", str(path.with_suffix(""))))


def _content(precision):
    """What runs by a map hang on beside its name."""
    if not maps.is_map(precision):
        return {}
    content = pathlib.Path(precision).expanduser().read_bytes()
    return {"the precision map (SHA-256)": _short_digest(content)}


def _config_of(question):
    """The config of the runs, less what differs between them."""
    recipe = load_recipe(question.recipe)
    config = run_config(recipe.Config, question.settings, REFERENCE, 0, "")
    own = ("precision", "seed", "output_dir", "checkpoint_dir")
    return {
        name: value if _is_json(value) else str(value)
        for name, value in dataclasses.asdict(config).items()
        if name not in own
    }


def _is_json(value):
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str, list, tuple))


def _digest(recipe):
    source = pathlib.Path(load_recipe(recipe).__file__ or recipe)
    return _short_digest(source.read_bytes())


def _short_digest(content):
    return hashlib.sha256(content).hexdigest()[:16]
