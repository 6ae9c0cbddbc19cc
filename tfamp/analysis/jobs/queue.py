"""Jobs one after another, each a Python process of its own.

A job writes its result, a JSON object, to the file it is given, all at once.
A result that is there is not made again, so that a series that was killed at
any moment goes on where it was. Beside `NAME.json` stands `NAME.command.json`:
`schema` ("tfamp.job/1"), `arguments`, `depends_on`, and `seconds`, null until
the job has ended.

When this process ends, also by SIGKILL, so does the running job, with all
processes below it: see `tfamp.analysis.jobs.process`.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

from tfamp.analysis.jobs.progress import JobProgress, format_duration
from tfamp.errors import InputError, JobError
from tfamp.files.output import write_atomically

_SCHEMA = "tfamp.job/1"
_EXIT_BAD_INPUT = 2
_LAST_BYTES = 65536

# Modules that did a job's work in 0.1.0, whose results still count.
_FORMER_NAMES = {"tfamp.analysis.parity_run": "tfamp.analysis.parity.run"}


@dataclasses.dataclass(frozen=True)
class Job:
    """One process, and what it leaves.

    Attributes:
        name: for progress and errors, such as "float32-seed0".
        arguments: of the Python interpreter: `("-m", "module", "--flag=1")`.
            `--result=PATH` is added.
        result: the JSON that the job writes, with
            `files.output.write_atomically`. Its folder is made.
        log: where the job's output goes. Its folder is made.
        depends_on: what else the result hangs on, such as versions: a result
            made under other values is not taken for this job's.
        kind: jobs of one kind take about as long; for the estimate.
    """

    name: str
    arguments: Sequence[str]
    result: pathlib.Path
    log: pathlib.Path
    depends_on: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kind: str = ""


def _accept(job: Job, result: dict[str, Any]) -> None:
    del job, result


@overload
def run_jobs(
    jobs: Sequence[Job],
    *,
    check: Callable[[Job, dict[str, Any]], None] = ...,
    timeout_s: float | None = ...,
    return_failures: Literal[False] = ...,
) -> list[dict[str, Any]]: ...


@overload
def run_jobs(
    jobs: Sequence[Job],
    *,
    check: Callable[[Job, dict[str, Any]], None] = ...,
    timeout_s: float | None = ...,
    return_failures: Literal[True],
) -> list[dict[str, Any] | JobError]: ...


def run_jobs(
    jobs: Sequence[Job],
    *,
    check: Callable[[Job, dict[str, Any]], None] = _accept,
    timeout_s: float | None = None,
    return_failures: bool = False,
) -> Sequence[dict[str, Any] | JobError]:
    """Runs the jobs in order, but for those whose result is there.

    Progress goes to stderr: a bar on a terminal, else a line for each job,
    both with the time that is left as the finished ones tell it.

    Args:
        jobs: with different results.
        check: is called with each result, also one that was there. What it
            raises ends the series: no time is spent on what cannot be used.
        timeout_s: seconds that one job may take; None for no limit.
        return_failures: a failed job gives its `JobError` in the place of a
            result, and the next one starts.

    Returns:
        The results, in the order of the jobs.

    Raises:
        InputError: a result there is one of another command, before anything
            runs; or a job itself found bad input (status 2).
        JobError: a job failed; its one line names the job, the last line of
            its output, and the log that holds all of it.
    """
    finished = {
        job.name: record["seconds"]
        for job in jobs
        if (record := _finished_before(job))
    }
    outcomes: list[dict[str, Any] | JobError] = []
    with JobProgress([(job.name, job.kind) for job in jobs]) as progress:
        progress.found(finished)
        for job in jobs:
            if job.name not in finished:
                progress.begin(job.name)
                begin = time.monotonic()
                try:
                    _run(job, timeout_s)
                except JobError as error:
                    if not return_failures:
                        raise
                    progress.failed(job.name)
                    outcomes.append(error)
                    continue
                seconds = time.monotonic() - begin
                _write_command(job, seconds)
                progress.finished(job.name, seconds)
            result = _read_json(job.result)
            outcomes.append(result)
            check(job, result)
    return outcomes


def _finished_before(job: Job) -> dict[str, Any] | None:
    """The record of a job whose result is there; None if it must run.

    Raises:
        InputError: what is there belongs to another command.
    """
    path = _command_path(job)
    if not path.exists():
        if job.result.exists():
            raise InputError(
                f"{job.result} is no result of this command; choose another "
                "output_dir, or move it away."
            )
        return None
    before, now = _read_json(path), _command(job)
    before["arguments"] = [
        _FORMER_NAMES.get(each, each) for each in before.get("arguments", ())
    ]
    for name in ("schema", "arguments", "depends_on"):
        if before.get(name) != now[name]:
            raise InputError(
                f"{path.parent} holds a run of another command: "
                f"{_difference(before.get(name), now[name])}. Choose another "
                "output_dir, or remove the folder to run it again."
            )
    return before if job.result.exists() else None


def _run(job: Job, timeout_s: float | None) -> None:
    for path in (job.result, job.log):
        path.parent.mkdir(parents=True, exist_ok=True)
    _write_command(job, seconds=None)
    with open(job.log, "wb") as log:
        watcher = subprocess.Popen(
            [
                *(sys.executable, "-m", "tfamp.analysis.jobs.process", "-u"),
                *(*job.arguments, f"--result={job.result}"),
            ],
            # Nothing is ever written: the end of this pipe is a sign.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Signals to this process's group leave it time to clean up.
            start_new_session=True,
        )
    try:
        status = watcher.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        raise JobError(
            f"{job.name} did not end within {format_duration(error.timeout)}; "
            f"its "
            f"output is in {job.log}.",
            status=None,
            last_line=_last_line(job.log),
        ) from None
    finally:
        if watcher.stdin is not None:
            watcher.stdin.close()
        watcher.wait()
    _check_end(job, status)


def _check_end(job: Job, status: int) -> None:
    last_line = _last_line(job.log)
    if status == _EXIT_BAD_INPUT and last_line.startswith("tfamp: "):
        raise InputError(last_line.removeprefix("tfamp: "))
    if status == 0 and job.result.exists():
        return
    how = f"failed with status {status}" if status else "left no result"
    raise JobError(
        f"{job.name} {how}: {last_line or 'no output'} (all of it: {job.log})",
        status=status,
        last_line=last_line,
    )


def _last_line(log: pathlib.Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(os.path.getsize(log) - _LAST_BYTES, 0))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in lines[::-1] if line.strip()), "")


def _command_path(job: Job) -> pathlib.Path:
    return job.result.with_suffix(".command.json")


def _command(job: Job) -> dict[str, Any]:
    return {
        "schema": _SCHEMA,
        "arguments": list(job.arguments),
        "depends_on": dict(job.depends_on),
    }


def _write_command(job: Job, seconds: float | None) -> None:
    record = _command(job) | {"seconds": seconds and round(seconds, 3)}
    write_atomically(_command_path(job), json.dumps(record, indent=2) + "\n")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); remove it to run the job again."
        ) from None


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in (*before, *now):
            if before.get(name) != now.get(name):
                return f"{name} was {before.get(name)}, is {now.get(name)}"
    if isinstance(before, list) and isinstance(now, list):
        gone = [each for each in before if each not in now]
        new = [each for each in now if each not in before]
        return f"it had {_words(gone)}, this one has {_words(new)}"
    return f"it had {before}, this one has {now}"


def _words(arguments: Sequence[str]) -> str:
    return " ".join(arguments) or "nothing else"
