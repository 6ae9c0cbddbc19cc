"""Measures a plan, model by model, and makes `compare.json` of it.

*   `schema`: "tfamp.compare/1".
*   `quick`: whether models and rounds were cut down; `device`, `threads`,
    `rounds`.
*   `environment`: as `tfamp.analysis.page.environment` describes it.
*   `models`: `name`, `title`, `case` (all numbers of it), `keras_parameters`,
    `keras_flops` (of a step's products), and with PyTorch
    `torch_parameters` and `torch_flops`.
*   `starts`: of each process `model`, `contestant`, `precision`, `losses`,
    `start_seconds` (of its first epochs), `compile_seconds`.
*   `runs`: of each turn `model`, `contestant`, `precision`, `round`,
    `step_milliseconds` (the median over the turn's epochs),
    `peak_memory_bytes` (resident on a CPU, given out on a GPU),
    `memory_growth_bytes` (over what was in use before the model was built:
    weights, moments, gradients, activations, and the graph),
    `waiting_cpu_share` (of the time it waited for its turn).
*   `summary`: as `figures.summarize` makes it; `goals`: as `goals.judge`.
*   `losses`: as `sameness.loss_differences`, with `model`.
*   `failures`: `model`, `contestant`, `precision`, `line`.
"""

import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.compare import figures, goals, race, sameness
from benchmarks.compare.cases import Case
from benchmarks.compare.contestants import Contestant
from benchmarks.compare.process import Entry
from benchmarks.compare.turns import Schedule
from tfamp.analysis.jobs.progress import JobProgress
from tfamp.errors import JobError
from tfamp.files.output import json_numbers

SCHEMA = "tfamp.compare/1"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    Attributes:
        cases: models in training.
        contestants: who trains them.
        precisions: in which, each of them.
        device: "cpu" or "gpu".
        threads: of an operation.
        schedule: of each process.
        quick: whether the cases are small ones.
        starts_at_once: processes that trace and compile side by side.
    """

    cases: Sequence[Case]
    contestants: Sequence[Contestant]
    precisions: Sequence[str]
    device: str
    threads: int
    schedule: Schedule
    quick: bool = False
    starts_at_once: int = 1

    @property
    def has_torch(self) -> bool:
        return any(each.framework == "torch" for each in self.contestants)

    def entries(self, case: Case, folder: pathlib.Path) -> list[Entry]:
        """The processes of a model; their files lie in the folder."""
        return [
            Entry(
                contestant,
                case,
                precision,
                self.device,
                self.threads,
                self.schedule,
                weights=folder / f"{case.name}.npz",
                log=folder / f"{case.name}-{contestant.name}-{precision}.log",
            )
            for precision in self.precisions
            for contestant in self.contestants
        ]


def measure(
    plan: Plan,
    folder: pathlib.Path,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Does it all, one model after another.

    Args:
        plan: what to measure.
        folder: for weights and logs; it is there.
        keep: is called with the record after each model.

    Returns:
        The record of all models.

    Raises:
        JobError: the models could not be built and counted.
    """
    record = _empty_record(plan)
    entries = {case: plan.entries(case, folder) for case in plan.cases}
    with JobProgress(_parts(plan, entries)) as bar:
        for case in plan.cases:
            _measure(plan, case, entries[case], folder, bar, record)
            record["summary"] = figures.summarize(record["runs"])
            record["goals"] = goals.judge(record["summary"])
            keep(record)
    return record


def complaint(record: dict[str, Any]) -> str | None:
    """One line where a contestant failed or trained another model, or None."""
    for each in record["failures"]:
        return (
            f"{each['contestant']} {each['precision']} failed on "
            f"{each['model']}: {each['line']}"
        )
    for model in record["models"]:
        for count in ("parameters", "flops"):
            ours, theirs = model[f"keras_{count}"], model.get(f"torch_{count}")
            if theirs not in (None, ours):
                return (
                    f"{model['name']} is not one model: {ours} {count} in "
                    f"Keras, {theirs} in PyTorch."
                )
    for each in record["losses"]:
        if not each["agrees"]:
            how = "no numbers"
            if each["difference"] is not None:
                how = (
                    f"off by {each['difference']:.2g} of theirs, more than "
                    f"{each['limit']:g}"
                )
            return (
                f"{each['contestant']} {each['precision']} does not train the "
                f"{each['model']} that the others train: its first losses are "
                f"{how}."
            )
    return None


def _measure(plan, case, entries, folder, progress, record):
    facts = _facts(plan, case, entries[0].weights, folder)
    outcome = race.run(entries, progress, plan.starts_at_once)
    name = {"model": case.name}
    record["models"].append(
        {
            "name": case.name,
            "title": case.title,
            "case": dataclasses.asdict(case),
            **facts,
        }
    )
    record["starts"] += [
        {
            **name,
            "contestant": start["contestant"],
            "precision": start["precision"],
            **json_numbers({"losses": start["losses"]}),
            "start_seconds": start["start_seconds"],
            "compile_seconds": start["start_seconds"][0]
            - start["start_seconds"][-1],
        }
        for start in outcome.starts
    ]
    record["runs"] += [
        figures.run_of(case.name, case.steps, turn) for turn in outcome.turns
    ]
    differences = sameness.loss_differences(outcome.starts)
    record["losses"] += [name | each for each in differences]
    record["failures"] += [name | each for each in outcome.failures]


def _empty_record(plan):
    # Imports TensorFlow, which a bad flag need not wait for.
    from tfamp.analysis.page import environment

    command = ["python", "-m", "benchmarks.compare", *sys.argv[1:]]
    described = environment.describe(command)
    if importlib.util.find_spec("torch"):
        described["versions"]["torch"] = importlib.metadata.version("torch")
    return {
        "schema": SCHEMA,
        "quick": plan.quick,
        "device": plan.device,
        "threads": plan.threads,
        "rounds": plan.schedule.rounds,
        "environment": described,
        "models": [],
        "starts": [],
        "runs": [],
        "losses": [],
        "failures": [],
        "summary": [],
        "goals": [],
    }


def _facts(plan, case, weights, folder) -> dict[str, int]:
    """Weights for all, and what is counted of them, by other processes."""
    facts = _facts_of("keras", plan, case, weights, folder)
    if plan.has_torch:
        facts |= _facts_of("torch", plan, case, weights, folder)
    return facts


def _facts_of(framework, plan, case, weights, folder) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    log = folder / f"{case.name}-facts-{framework}.log"
    process = context.Process(
        target=sameness.run,
        args=(case, weights, log, framework, plan.threads, theirs),
    )
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise JobError(
            f"{case.name} could not be built; see {log}.", None, ""
        ) from None
    finally:
        process.join()


def _parts(plan, entries) -> list[tuple[str, str]]:
    """Name and kind of what the progress counts."""
    found = []
    for case, these in entries.items():
        found += [(race.start_name(e), f"start {case.name}") for e in these]
        found += [
            (race.round_name(these[0], number + 1), f"round {case.name}")
            for number in range(plan.schedule.rounds)
        ]
    return found
