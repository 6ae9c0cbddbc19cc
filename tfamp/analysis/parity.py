"""Does mixed precision give the result that float32 gives? The runs.

Each precision trains the recipe with the same seeds: equal initial weights,
equal data in equal order, equal budget. A run is a process of its own, in
`OUTPUT_DIR/runs/PRECISION-seedN`. Finished runs are kept, so that a series
goes on where it was stopped, and more seeds or precisions can be added. What
comes of it is in `tfamp.analysis.parity_record`.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tfamp.analysis import environment, parity_record
from tfamp.analysis.equivalence import check_test
from tfamp.analysis.final_metric import choose_metric
from tfamp.analysis.jobs import Job, run_jobs
from tfamp.analysis.parity_run import run_config
from tfamp.errors import InputError
from tfamp.output_files import make_folder, output_folder, write_atomically
from tfamp.precision import PRECISIONS, resolve_precision
from tfamp.recipe import load_recipe

REFERENCE = "float32"
FILE_NAME = "parity.json"


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of a recipe.

    Attributes:
        recipe: a module or a file, as `tfamp.recipe.load_recipe` takes it.
        settings: fields of its `Config` and their text.
        precisions: float32, the reference, and others.
        seeds: how many: 0, 1, and so on.
        margin: the largest difference of the metric that does not matter, in
            the metric's own unit.
        metric: of those that `train` returns; None to choose by name.
        greater_is_better: None to tell by the metric's name.
        alpha: the chance to call equivalent what differs by the margin.

    Raises:
        InputError: one of these cannot be used.
    """

    recipe: str
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    precisions: Sequence[str] = PRECISIONS
    seeds: int = 5
    margin: float = 0.01
    metric: str | None = None
    greater_is_better: bool | None = None
    alpha: float = 0.05

    def __post_init__(self):
        check_test(self.margin, self.alpha)
        if self.seeds < 1:
            raise InputError(f"seeds={self.seeds} must be at least 1.")
        for name in self.precisions:
            if name not in PRECISIONS:
                raise InputError(
                    f"Unknown precision {name!r}; expected some of "
                    f"{', '.join(PRECISIONS)}."
                )
            if self.precisions.count(name) > 1:
                raise InputError(f"Precision {name!r} is named twice.")
            resolve_precision(name)
        if REFERENCE not in self.precisions or len(self.precisions) < 2:
            raise InputError(
                f"precisions={','.join(self.precisions)}; expected "
                f"{REFERENCE}, the reference, and at least one other."
            )

    @property
    def others(self) -> list[str]:
        """The precisions that are compared with float32."""
        return [name for name in self.precisions if name != REFERENCE]


def measure(
    question: Question, output_dir: str | os.PathLike
) -> dict[str, Any]:
    """Does the runs that are missing, and writes `parity.json`.

    Args:
        question: what to run, and how to judge it.
        output_dir: a local folder; made where it is missing.

    Returns:
        What `parity.json` holds: see `tfamp.analysis.parity_record`.

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
            name = f"{precision}-seed{seed}"
            run_folder = folder / "runs" / name
            jobs.append(
                Job(
                    name,
                    (
                        *("-m", "tfamp.analysis.parity_run", question.recipe),
                        *(f"--precision={precision}", f"--seed={seed}"),
                        *settings,
                    ),
                    result=run_folder / "result.json",
                    log=run_folder / "log.txt",
                    depends_on=depends_on,
                    kind=precision,
                )
            )
    return jobs


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
    source = pathlib.Path(load_recipe(recipe).__file__)
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16]
