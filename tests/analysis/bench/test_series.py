"""`tfamp bench`: runs in order, what it refuses, and one benchmark whole."""

import json
import os
import pathlib

import keras
import pytest
import tensorflow as tf

import tfamp
from tests.analysis.bench.test_figures import run
from tfamp import cli
from tfamp.analysis.bench import feed, memory
from tfamp.analysis.bench import part as bench_part
from tfamp.analysis.bench import record as bench_record
from tfamp.analysis.bench import run as bench_run
from tfamp.analysis.bench import series as bench
from tfamp.analysis.bench.product_rate import product_rate
from tfamp.errors import JobError
from tfamp.hardware.devices import KNOWN_HARDWARE, Hardware

RECIPE = str(pathlib.Path(__file__).with_name("bench_recipe.py"))
CPU = Hardware("cpu", ("a CPU",), memory_bytes=8 * 2**30)


@pytest.fixture
def planned(monkeypatch):
    """The jobs that `bench.measure` asks for; each gives a made-up result.

    A trial of a batch fits up to 24 rows.
    """
    jobs = []

    def run_jobs(these, return_failures=False):
        jobs.extend(these)
        outcomes = []
        for job in these:
            options = dict(
                argument.removeprefix("--").split("=", 1)
                for argument in job.arguments
                if "=" in argument
            )
            if int(options.get("rows", 0)) > 24:
                assert return_failures
                outcomes.append(JobError("no", bench_run.OUT_OF_MEMORY, "no"))
                continue
            result = run(options["precision"], 0, 4.0)
            del result["name"], result["round"]
            result["tf32"] = options.get("tf32")
            outcomes.append({**result, "flops_per_step": 2e9})
        return outcomes

    monkeypatch.setattr(bench, "run_jobs", run_jobs)
    return jobs


def test_runs_take_turns_so_that_drift_touches_all(planned, tmp_path):
    plan = bench.Plan(RECIPE, {"batch_size": "4"}, rounds=2, steps=7)
    bench.measure(plan, tmp_path)
    assert [job.name for job in planned] == [
        "float32-round1",
        "mixed_bfloat16-round1",
        "mixed_float16-round1",
        "float32-round2",
        "mixed_bfloat16-round2",
        "mixed_float16-round2",
    ]
    first, second, *_ = planned
    assert "--config.batch_size=4" in first.arguments
    assert "--steps=7" in first.arguments
    # Operations are the same in every run: they are counted once.
    assert "--count_flops" in first.arguments
    assert "--count_flops" not in second.arguments


def test_a_second_benchmark_measures_anew(planned, tmp_path):
    plan = bench.Plan(RECIPE, precisions=("float32",), rounds=1)
    bench.measure(plan, tmp_path)
    bench.measure(plan, tmp_path)
    results = [job.result for job in planned]
    assert results[0] != results[1]
    assert tmp_path not in results[0].parents


def test_float32_comes_first_and_without_tf32_where_there_is_such_a_thing():
    precisions = ("mixed_bfloat16", "float32")
    names = [each.name for each in bench.make_series(precisions, CPU)]
    assert names == ["float32", "mixed_bfloat16"]
    series = bench.make_series(precisions, KNOWN_HARDWARE["A100"])
    assert [(each.name, each.tf32) for each in series] == [
        ("float32", "on"),
        ("float32_tf32_off", "off"),
        ("mixed_bfloat16", ""),
    ]
    series = bench.make_series(precisions, KNOWN_HARDWARE["T4"])
    assert len(series) == 2


def test_the_largest_batch_is_told_apart_from_the_ratios(planned, tmp_path):
    plan = bench.Plan(
        RECIPE,
        precisions=("float32", "mixed_bfloat16"),
        rounds=1,
        largest_batch=True,
        memory_limit_gib=0.5,
    )
    record = bench.measure(plan, tmp_path)
    assert record["largest_batches"] == {
        "float32": {"rows": 24, "fails": 25},
        "mixed_bfloat16": {"rows": 24, "fails": 25},
    }
    assert record["memory_limit_bytes"] == 2**29
    trial = next(job for job in planned if "batch" in job.name)
    assert f"--memory_limit={2**29}" in trial.arguments
    (_, _, _, largest, _) = bench_part.part(record).tables
    assert "no part of the ratios" in largest.caption


def test_a_trial_that_fails_for_another_reason_is_no_answer(
    planned, monkeypatch, tmp_path
):
    run_jobs = bench.run_jobs

    def failing(jobs, return_failures=False):
        if return_failures:
            return [JobError("it broke", 1, "it broke")]
        return run_jobs(jobs)

    monkeypatch.setattr(bench, "run_jobs", failing)
    plan = bench.Plan(RECIPE, largest_batch=True, memory_limit_gib=0.5)
    with pytest.raises(JobError, match="it broke"):
        bench.measure(plan, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precisions=float32,float4"], "Unknown precision 'float4'"),
        (["--precisions=float32,auto"], "'auto' cannot be compared"),
        (["--precisions=mixed_bfloat16"], "lacks float32"),
        (["--precisions=float32,float32"], "named twice"),
        (["--steps=0"], "steps=0 must be at least 1"),
        (["--rounds=-1"], "rounds=-1 must be at least 1"),
        (["--largest_batch"], "say how much it may take"),
        (["--largest_batch", "--memory_limit_gib=0"], "expected more than 0"),
        (["--largest_batch", "--memory_limit_gib=1e6"], "of this machine"),
        (["--memory_limit_gib=1"], "for the search of --largest_batch"),
        (["--config.precision=float32"], "use --precisions=..."),
        (["--config.batch_size=0"], "batch_size=0 is out of range"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    arguments, message, planned, tmp_path, capsys
):
    folder = tmp_path / "new"
    status = cli.main(["bench", RECIPE, *arguments, f"--output_dir={folder}"])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not planned
    assert not folder.exists()


def test_a_gpu_has_its_own_limit(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "detect_hardware", lambda: KNOWN_HARDWARE["T4"])
    plan = bench.Plan(RECIPE, largest_batch=True, memory_limit_gib=1)
    with pytest.raises(tfamp.InputError, match="a GPU has a limit of its own"):
        bench.measure(plan, tmp_path)


def record_of(milliseconds):
    """A record of three rounds; of mixed_bfloat16 with these figures."""
    runs = [{**run("float32", i, 4.0), "flops_per_step": 2e9} for i in range(3)]
    runs += [
        run("mixed_bfloat16", i, each) for i, each in enumerate(milliseconds)
    ]
    return bench_record.make(bench.Plan("recipe", rounds=3), runs, CPU)


def test_the_part_says_what_is_claimed_and_draws_it():
    part = bench_part.part(record_of([2.0, 2.2, 1.8]))
    assert part.is_good
    assert part.verdict.startswith("mixed_bfloat16 is faster: 2.00 times")
    speed, memory_table, step, runs = part.tables
    assert speed.rows[1][4:] == ("0.500", "0.450 to 0.550")
    assert memory_table.columns[0] == step.columns[0] == "precision"
    assert len(runs.rows) == 6
    (plot,) = part.plots
    assert "time of a step 0.50 of float32's" in plot.alternative
    assert plot.svg.startswith("<svg")
    assert "once in 4 times" in part.notes[0]


@pytest.mark.slow
def test_a_doubtful_speed_up_is_not_called_good():
    record = record_of([2.0, 2.0, 2.0])
    record["callouts"] = [{"rule": "too_small", "name": None, "message": "Hm."}]
    part = bench_part.part(record)
    assert not part.is_good
    assert part.remarks == ["Hm."]
    callout = record["callouts"][0]
    for name, is_good in [
        ("mixed_float16", True),
        ("mixed_bfloat16", False),
        ("float32", False),
    ]:
        callout["name"] = name
        assert bench_part.part(record).is_good == is_good


def test_float32_alone_is_nothing_to_judge():
    runs = [{**run("float32", 1, 4.0), "flops_per_step": None}]
    runs[0]["flops_reason"] = "a loop"
    plan = bench.Plan("recipe", precisions=("float32",), rounds=1)
    part = bench_part.part(bench_record.make(plan, runs, CPU))
    assert part.is_good is None
    assert not part.plots
    assert "cannot be counted: a loop." in part.notes[-1]


@pytest.mark.parametrize(
    ("behave", "status", "message"),
    [
        ("short", 2, "train ended before enough steps"),
        ("alone", 2, "must call tfamp.fit"),
        ("exhausted", bench_run.OUT_OF_MEMORY, "out of memory: no memory left"),
    ],
)
def test_a_run_without_figures_says_why(
    behave, status, message, tmp_path, capsys
):
    result = tmp_path / "result.json"
    arguments = [RECIPE, "--precision=float32", "--steps=50"]
    arguments += [f"--config.behave={behave}", f"--result={result}"]
    assert bench_run.main(arguments) == status
    assert message in capsys.readouterr().err
    assert not result.exists()


def test_a_batch_is_tried_however_few_examples_there_are(tmp_path, monkeypatch):
    shapes, rebatched = [], feed.rebatched

    def spy(data, rows):
        data = rebatched(data, rows)
        shapes.append(data.element_spec[0].shape)
        return data

    monkeypatch.setattr(feed, "rebatched", spy)
    result = tmp_path / "result.json"
    arguments = [RECIPE, "--precision=float32", "--rows=1000"]
    assert bench_run.main([*arguments, f"--result={result}"]) == 0
    assert json.loads(result.read_text())["rows"] == 1000
    assert shapes == [(1000, 16)]


def test_a_trial_that_takes_more_memory_than_it_may_ends(monkeypatch, capsys):
    ended = []

    def end(status):
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    now = iter([2**30, 2**30, 2**30 + 1])
    monkeypatch.setattr(memory, "resident_bytes", lambda: next(now))
    with pytest.raises(SystemExit):
        bench_run._watch_memory(2**30)
    assert ended == [bench_run.OUT_OF_MEMORY]
    # As much as the limit was no reason to end.
    assert not list(now)
    assert "more than 1 GiB" in capsys.readouterr().err


def test_xla_reports_missing_memory_as_an_internal_error():
    error = tf.errors.InternalError(None, None, "RESOURCE_EXHAUSTED: Out of m")
    assert bench_run.is_out_of_memory(error)
    assert bench_run.is_out_of_memory(MemoryError())
    assert not bench_run.is_out_of_memory(ValueError("memory"))


def test_peak_memory_has_seen_what_is_gone_by_now():
    before = memory.peak_resident_bytes()
    block = bytearray(b"1") * (200 * 2**20)
    assert memory.resident_bytes() > 200 * 2**20
    del block
    peak = memory.peak_bytes(tf.distribute.get_strategy())
    assert peak >= memory.resident_bytes()
    assert peak >= min(before, memory.resident_bytes()) + 2**20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_rate_is_that_of_an_actual_product(dtype, monkeypatch):
    monkeypatch.setattr("tfamp.analysis.bench.product_rate._SIZES", (64,))
    # No processor of today multiplies at less than a megaflop.
    assert 1e6 < product_rate(dtype) < 1e17


@pytest.mark.slow
def test_a_benchmark_from_command_to_report(tmp_path, capsys, fits_schema):
    status = cli.main(
        [
            "bench",
            RECIPE,
            "--precisions=float32,mixed_bfloat16",
            "--rounds=1",
            "--steps=1",
            "--config.jit=off",
            f"--output_dir={tmp_path}",
        ]
    )
    printed = capsys.readouterr().out
    assert status == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    fits_schema(record)
    assert [r["precision"] for r in record["runs"]] == [
        "float32",
        "mixed_bfloat16",
    ]
    for each in record["runs"]:
        assert each["batch_size"] == 8
        assert each["step_milliseconds"] > 0
        assert each["memory_growth_bytes"] > 0
        assert each["trained_precision"] == each["precision"]
    # Both layers' weights, and the gradient between them.
    assert record["flops_per_step"] == 2 * 8 * (2 * 16 * 32 + 3 * 32)
    assert set(record["ratios"]) == {"mixed_bfloat16"}
    assert {"few_rounds", "too_small"} <= {
        callout["rule"] for callout in record["callouts"]
    }
    assert "Too small a model" in printed
    assert str(tmp_path / "report.html") in printed
    assert "Too small a model" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "logs" / "float32-round1.log").stat().st_size
    assert keras.config.dtype_policy().name == "float32"


def test_rates_are_of_every_gpu_but_of_one_cpu():
    runs = [{**run("float32", 1, 4.0, replicas=2), "flops_per_step": 2e9}]
    plan = bench.Plan("recipe", precisions=("float32",), rounds=1)
    on_gpus = bench_record.make(plan, runs, KNOWN_HARDWARE["T4"])
    assert on_gpus["shares"]["float32"]["product_share"] == 0.25
    # Its logical devices share the cores that the rate was measured on.
    on_cpu = bench_record.make(plan, runs, CPU)
    assert on_cpu["shares"]["float32"]["product_share"] == 0.5
