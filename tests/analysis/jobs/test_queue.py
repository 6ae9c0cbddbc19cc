"""Jobs in processes of their own: kept, failed, killed."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tests.conftest import ROOT
from tfamp.analysis.jobs.progress import JobProgress, format_duration
from tfamp.analysis.jobs.queue import Job, run_jobs
from tfamp.errors import InputError, JobError
from tfamp.recipe import describe_exit

# Notes that it ran, and behaves as it is told.
PROGRAM = """
import json, os, pathlib, subprocess, sys, time

result = pathlib.Path(sys.argv[-1].removeprefix("--result="))
name, behave = sys.argv[1:3]
with open(result.parent / "ran.txt", "a") as file:
    file.write(name + "\\n")
match behave:
    case "fail":
        print("about to fail")
        raise KeyError("lost")
    case "killed":
        os.kill(os.getpid(), 9)
    case "bad input":
        print("tfamp: No such thing.", file=sys.stderr)
        sys.exit(2)
    case "silent":
        sys.exit(0)
    case "hang":
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"],
            start_new_session=True,
        )
        (result.parent / "pids.tmp").write_text(f"{os.getpid()} {child.pid}")
        os.rename(result.parent / "pids.tmp", result.parent / "pids")
        time.sleep(600)
result.write_text(json.dumps({"name": name}))
"""


@pytest.fixture
def make_job(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))

    def make(name, behave="well", **options):
        return Job(
            name,
            (str(program), name, behave),
            result=tmp_path / "out" / f"{name}.json",
            log=tmp_path / "out" / f"{name}.txt",
            **options,
        )

    return make


@pytest.fixture
def ran(tmp_path):
    """The names of the jobs that ran, in order."""

    def names():
        path = tmp_path / "out" / "ran.txt"
        return path.read_text().split() if path.exists() else []

    return names


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] not in "ZX"


def test_results_come_in_order_with_a_line_for_each(make_job, ran, capfd):
    results = run_jobs([make_job("a"), make_job("b"), make_job("c")])
    assert results == [{"name": name} for name in "abc"]
    assert ran() == ["a", "b", "c"]
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["1/3", "a"],
        ["2/3", "b"],
        ["3/3", "c"],
    ]
    assert "left" in lines[0]
    assert "left" not in lines[2]


def test_a_finished_job_is_not_repeated(make_job, ran, capfd):
    run_jobs([make_job("a")])
    assert run_jobs([make_job("a"), make_job("b")]) == [
        {"name": "a"},
        {"name": "b"},
    ]
    assert ran() == ["a", "b"]
    assert "1/2  1 finished before" in capfd.readouterr().err


def test_a_job_that_began_and_left_no_result_runs_again(make_job, ran):
    job = make_job("a")
    run_jobs([job])
    job.result.unlink()
    run_jobs([job])
    assert ran() == ["a", "a"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arguments": ("program.py", "b")}, "it had .*a well.*, this one has"),
        ({"depends_on": {"keras": "4.0"}}, "keras was 3.0, is 4.0"),
    ],
)
def test_a_result_of_another_command_is_refused_before_anything_runs(
    make_job, ran, change, named
):
    job = make_job("a", depends_on={"keras": "3.0"})
    run_jobs([job])
    with pytest.raises(InputError, match=named) as caught:
        run_jobs([make_job("first"), dataclasses.replace(job, **change)])
    assert "another output_dir" in str(caught.value)
    assert ran() == ["a"]


def test_a_result_of_0_1_0_counts_under_the_former_name_of_its_module(
    make_job, ran
):
    job = dataclasses.replace(
        make_job("a"), arguments=("-m", "tfamp.analysis.parity.run", "x")
    )
    job.result.parent.mkdir(parents=True)
    job.result.write_text('{"seed": 3}')
    job.result.with_suffix(".command.json").write_text(
        json.dumps(
            {
                "schema": "tfamp.job/1",
                "arguments": ["-m", "tfamp.analysis.parity_run", "x"],
                "depends_on": dict(job.depends_on),
                "seconds": 1.0,
            }
        )
    )
    assert run_jobs([job]) == [{"seed": 3}]
    assert ran() == []


def test_a_file_that_no_job_wrote_is_not_taken_for_a_result(make_job):
    job = make_job("a")
    job.result.parent.mkdir()
    job.result.write_text("{}")
    with pytest.raises(InputError, match="is no result of this command"):
        run_jobs([job])


def test_a_result_that_is_no_json_is_named(make_job):
    job = make_job("a")
    run_jobs([job])
    job.result.write_text("{")
    with pytest.raises(InputError, match=r"a\.json cannot be read"):
        run_jobs([job])


@pytest.mark.parametrize(
    ("behave", "status", "how"),
    [
        ("fail", 1, "a failed with status 1: KeyError: 'lost'"),
        ("killed", 128 + 9, "a failed with status 137: no output"),
        ("silent", 0, "a left no result: no output"),
    ],
)
def test_a_failed_job_ends_the_series_in_one_line(
    make_job, ran, behave, status, how
):
    job = make_job("a", behave)
    with pytest.raises(JobError) as caught:
        run_jobs([job, make_job("b")])
    assert str(caught.value).startswith(how)
    assert str(job.log) in str(caught.value)
    assert caught.value.status == status
    assert describe_exit(caught.value) == (str(caught.value), 1)
    assert ran() == ["a"]


def test_failures_can_be_results(make_job, ran, capfd):
    failure, result = run_jobs(
        [make_job("a", "fail"), make_job("b")], return_failures=True
    )
    assert failure.last_line == "KeyError: 'lost'"
    assert result == {"name": "b"}
    assert "1/2  a  failed" in capfd.readouterr().err
    assert "about to fail" in make_job("a").log.read_text()


def test_bad_input_that_a_job_finds_is_bad_input(make_job):
    with pytest.raises(InputError, match=r"^No such thing\.$"):
        run_jobs([make_job("a", "bad input")])


def test_a_result_that_cannot_be_used_ends_the_series(make_job, ran):
    def refuse(job, result):
        raise InputError(f"{job.name} gave {result}")

    jobs = [make_job("a"), make_job("b")]
    for _ in "before", "found":
        with pytest.raises(InputError, match=r"a gave .*'name': 'a'"):
            run_jobs(jobs, check=refuse)
        assert ran() == ["a"]


def test_a_job_that_takes_too_long_is_killed_with_all_below_it(
    make_job, tmp_path
):
    with pytest.raises(JobError, match="a did not end within 1 s") as caught:
        run_jobs([make_job("a", "hang")], timeout_s=1.0)
    assert caught.value.status is None
    for pid in (tmp_path / "out" / "pids").read_text().split():
        assert not is_alive(pid)


def test_ctrl_c_kills_the_job_and_all_below_it(make_job, tmp_path):
    pids = tmp_path / "out" / "pids"
    main = threading.main_thread().ident

    def interrupt():
        wait_for(pids.exists)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([make_job("a", "hang")])
    thread.join()
    for pid in pids.read_text().split():
        assert not is_alive(pid)


def test_what_was_run_stands_beside_the_result(make_job):
    run_jobs([make_job("a", depends_on={"keras": "3.0"})])
    path = make_job("a").result.with_suffix(".command.json")
    record = json.loads(path.read_text())
    assert record["schema"] == "tfamp.job/1"
    assert record["arguments"][1:] == ["a", "well"]
    assert record["depends_on"] == {"keras": "3.0"}
    assert record["seconds"] > 0


def test_time_left_is_told_by_the_finished_jobs_of_a_kind(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    jobs = [("a0", "a"), ("b0", "b"), ("a1", "a"), ("b1", "b"), ("c", "c")]
    progress = JobProgress(jobs)
    assert progress.seconds_left() is None
    progress.begin("a0")
    progress.finished("a0", 10.0)
    assert progress.seconds_left() == 40.0
    progress.begin("b0")
    progress.finished("b0", 30.0)
    # a1 takes 10, b1 30, and c the mean of both.
    assert progress.seconds_left() == 60.0
    progress.begin("a1")
    now = 4.0
    assert progress.seconds_left() == 56.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (7500, "2 h 5 min")],
)
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text


def test_no_job_is_left_behind_by_a_parent_that_is_killed(make_job, tmp_path):
    # As `run_jobs` starts it; the pipe is all that the watcher knows of us.
    job = make_job("a", "hang")
    job.result.parent.mkdir()
    watcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "tfamp.analysis.jobs.process"),
            *(*job.arguments, f"--result={job.result}"),
        ],
        stdin=subprocess.PIPE,
        cwd=ROOT,
    )
    pids = tmp_path / "out" / "pids"
    wait_for(pids.exists)
    watcher.stdin.close()
    watcher.wait(20)
    for pid in pids.read_text().split():
        assert not is_alive(pid)
