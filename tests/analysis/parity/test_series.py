"""Parity: what passes, what must not, and what the command does about it."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import pytest

from tests.analysis.parity import parity_recipe
from tests.conftest import ROOT
from tfamp import cli
from tfamp.analysis.parity import part as parity_part
from tfamp.analysis.parity import record as parity_record
from tfamp.analysis.parity import run as parity_run
from tfamp.analysis.parity import series
from tfamp.analysis.parity.final_metric import choose_metric, is_greater_better
from tfamp.analysis.parity.series import Question
from tfamp.analysis.parity.step_losses import StepLosses
from tfamp.analysis.report import write
from tfamp.errors import InputError
from tfamp.precision.policy import PRECISIONS

RECIPE = parity_recipe.__file__


def measure(precision, seed=0, **settings):
    """One run of the recipe, in this process."""
    config = parity_run.run_config(
        parity_recipe.Config, settings, precision, seed, ""
    )
    return parity_run.measure(parity_recipe, config)


def record_of(runs, **options):
    precisions = tuple(dict.fromkeys(run["precision"] for run in runs))
    seeds = len({run["seed"] for run in runs})
    question = Question(RECIPE, precisions=precisions, seeds=seeds, **options)
    return parity_record.make(
        runs, question=question, config={}, environment={}
    )


def prove(*precisions, seeds=2, options=None, **settings):
    """The record of a recipe in float32 and other precisions."""
    runs = [
        measure(precision, seed, **settings)
        for seed in range(seeds)
        for precision in ("float32", *precisions)
    ]
    return record_of(runs, **(options or {}))


@pytest.fixture
def without_evaluations(monkeypatch):
    """Leaves out what costs half of a run."""
    monkeypatch.setattr(
        parity_run, "_evaluations", lambda *_: (None, "left out")
    )


def a_run(precision, seed, accuracy, losses=(1.0, 0.5), **changes):
    """A run as `parity_run` leaves it."""
    return {
        "precision": precision,
        "seed": seed,
        "status": "finished",
        "reason": None,
        "seconds": 1.0,
        "metrics": {"loss": losses[-1], "accuracy": accuracy},
        "steps": list(range(1, len(losses) + 1)),
        "losses": list(losses),
        "scale_changes": [],
        "evaluations": None,
        "evaluations_reason": "left out",
    } | changes


def runs_of(float32, other, precision="mixed_float16"):
    """Runs with these accuracies, by seed."""
    return [
        a_run(p, seed, accuracy)
        for p, accuracies in (("float32", float32), (precision, other))
        for seed, accuracy in enumerate(accuracies)
    ]


# What must pass, and what must not.


@pytest.mark.slow
def test_a_recipe_in_mixed_precision_passes():
    options = {"metric": "loss", "margin": 0.01}
    record = prove("mixed_float16", options=options)
    assert record["equivalent"] == {"mixed_float16": True}
    (test,) = record["tests"]
    assert test["method"] == "t-test"
    assert test["p_value"] < 0.05
    assert (
        "mixed_float16 is equivalent to float32: loss differs by"
        in record["verdict"]
    )
    # The trained weights, evaluated in every precision.
    for each in record["evaluations"]:
        assert set(each["metrics_in"]) == {
            "float32",
            "mixed_bfloat16",
            "mixed_float16",
        }
    # Same weights and data: the first losses differ by float16's rounding.
    for each in record["divergence"]:
        assert 0 < each["at_first_step"] < each["epsilon"] == 2.0**-10
    # Other seeds differ by much more than precisions do.
    noise = record["noise"]
    assert noise["largest"] > 10 * max(map(abs, test["differences"]))
    assert noise["trajectory"]["first_step"] == 1


@pytest.mark.slow
def test_tiny_gradients_without_loss_scaling_do_not_pass(without_evaluations):
    record = prove("mixed_float16", behave="unscaled")
    assert record["equivalent"] == {"mixed_float16": False}
    assert record["tests"][0]["mean_difference"] < -0.1


@pytest.mark.slow
def test_16_bit_master_weights_do_not_pass(without_evaluations):
    record = prove(
        "mixed_bfloat16",
        options={"metric": "loss", "margin": 0.01},
        behave="16_bit_weights",
        repeats="20",
        steps_per_loop="40",
    )
    assert record["equivalent"] == {"mixed_bfloat16": False}
    # They learn less, by more than the margin.
    assert "mixed_bfloat16 is worse than float32" in record["verdict"]


def test_training_that_gives_up_is_a_result_and_does_not_pass():
    run = measure("mixed_float16", behave="overflow", on_overflow="stop")
    assert run["status"] == "failed"
    record = record_of([a_run("float32", 0, 0.9), run])
    assert record["equivalent"] == {"mixed_float16": False}
    assert "mixed_float16 failed with seed 0" in record["verdict"]
    assert "not finite" in record["runs"][1]["reason"]
    json.dumps(record, allow_nan=False)


@pytest.mark.slow
def test_a_metric_that_is_no_number_is_a_result_and_does_not_pass(
    without_evaluations,
):
    run = measure("mixed_float16", behave="nan")
    record = record_of([a_run("float32", 0, 0.9), run], metric="loss")
    assert record["runs"][1]["status"] == "diverged"
    assert record["equivalent"] == {"mixed_float16": False}
    assert "diverged with seed 0: loss at the end" in record["verdict"]


@pytest.mark.parametrize(
    ("evaluated", "reason"),
    [
        ({"loss": 0.5}, "tfamp.evaluate gives no accuracy"),
        ({"accuracy": 0.45}, "they are not the same measure"),
        ({"accuracy": None}, "they are not the same measure"),
    ],
)
def test_a_metric_that_evaluation_does_not_give_is_not_compared(
    evaluated, reason
):
    runs = runs_of([0.9], [0.9])
    for run in runs:
        run["evaluations"] = {"float32": evaluated, "mixed_float16": evaluated}
    for each in record_of(runs)["evaluations"]:
        assert each["metrics_in"] is None
        assert reason in each["reason"]


def test_an_error_in_the_extra_evaluation_is_a_reason(monkeypatch):
    def fail(*_):
        raise RuntimeError("no more data\nand a long story")

    monkeypatch.setattr(parity_run, "_evaluate", fail)
    recorder = StepLosses()
    recorder.losses[1] = 0.5
    recorder.set_model(parity_recipe.build_model(parity_recipe.Config()))
    assert parity_run._evaluations(
        parity_recipe, parity_recipe.Config(), recorder
    ) == (None, "RuntimeError: no more data")


# The verdict on results that one can read.


def test_one_seed_proves_nothing():
    record = record_of(runs_of([0.9], [0.9]))
    assert record["equivalent"] == {"mixed_float16": False}
    assert "One seed proves nothing: at least 2" in record["verdict"]


@pytest.mark.parametrize(
    ("other", "metric", "words"),
    [
        ([0.7, 0.71, 0.69], "accuracy", "mixed_float16 is worse than"),
        ([0.99, 1.0, 0.98], "accuracy", "mixed_float16 is better than"),
        ([0.89, 0.94, 0.87], "accuracy", "mixed_float16: undecided"),
        (
            [0.901, 0.899, 0.902],
            "accuracy",
            "mixed_float16 is equivalent to float32",
        ),
    ],
)
def test_the_verdict_says_what_was_shown(other, metric, words):
    record = record_of(runs_of([0.9, 0.9, 0.9], other), metric=metric)
    assert record["verdict"].startswith(words)
    assert record["equivalent"]["mixed_float16"] == ("equivalent" in words)


def test_more_of_a_loss_is_worse_unless_the_user_says_otherwise():
    runs = runs_of([0.1] * 3, [0.1] * 3)
    for run in runs[3:]:
        run["metrics"]["loss"] += 1.0 + 0.01 * run["seed"]
    assert "is worse" in record_of(runs, metric="loss")["verdict"]
    record = record_of(runs, metric="loss", greater_is_better=True)
    assert "is better" in record["verdict"]


def test_a_reference_that_fails_fails_every_comparison():
    runs = runs_of([0.9, 0.9], [0.9, 0.9])
    runs[1] |= {"status": "failed", "reason": "the end.", "metrics": {}}
    record = record_of(runs)
    assert record["equivalent"] == {"mixed_float16": False}
    assert "float32 itself failed with seed 1: the end." in record["verdict"]
    assert record["summary"][0]["runs"] == 1


def test_runs_that_all_fail_leave_a_record():
    runs = runs_of([0.9, 0.9], [0.9, 0.9])
    for run in runs:
        run |= {"status": "failed", "reason": "why", "metrics": {}}
        run |= {"steps": [], "losses": []}
    record = record_of(runs)
    assert record["metric"] is None
    assert record["equivalent"] == {"mixed_float16": False}
    assert not parity_part.part(record).is_good


def test_equal_results_of_different_runs_are_not_called_identical():
    runs = runs_of([0.9, 0.9], [0.9, 0.9])
    runs[3]["losses"] = [1.0, 0.4]
    record = record_of(runs)
    assert record["tests"][0]["method"] == "sign test"
    assert not record["equivalent"]["mixed_float16"]


@pytest.mark.slow
def test_what_seeds_cannot_tell_yet_is_undecided_and_not_bad():
    record = record_of(runs_of([0.9, 0.9], [0.905, 0.898]))
    part = parity_part.part(record)
    assert (part.is_good, part.is_undecided) == (False, True)
    assert part.verdict == "Undecided, for want of seeds: mixed_float16."
    (test,) = record["tests"]
    assert f"--seeds={test['seeds_needed']} goes on" in record["verdict"]
    assert part.tables[1].rows[0][-1] == "undecided"

    part = parity_part.part(record_of(runs_of([0.9] * 3, [0.7, 0.71, 0.69])))
    assert (part.is_good, part.is_undecided) == (False, False)
    assert part.verdict == "Not equivalent to float32: mixed_float16."


def test_a_margin_as_large_as_the_metric_is_pointed_out():
    runs = runs_of([0.001, 0.002], [0.001, 0.0015])
    assert "Mind the margin: 0.01 is much" in record_of(runs)["verdict"]
    assert "Mind" not in record_of(runs_of([0.9], [0.9]))["verdict"]


def test_differences_are_of_the_same_seed_in_whatever_order_runs_come():
    runs = runs_of([0.1, 0.5, 0.9], [0.2, 0.5, 0.7])
    (test,) = record_of(runs)["tests"]
    assert test["differences"] == pytest.approx([0.1, 0.0, -0.2])


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """The path of a map, as `tfamp tune` saves it."""
    monkeypatch.chdir(tmp_path)
    policies = keras.dtype_policies.DTypePolicyMap("mixed_bfloat16")
    policies["second"] = "float32"
    record = {
        "schema": "tfamp.tune/1",
        "precision": "mixed_bfloat16",
        "dtype_policy_map": keras.dtype_policies.serialize(policies),
    }
    path = pathlib.Path("tuned/tune.json")
    path.parent.mkdir()
    path.write_text(json.dumps(record))
    return str(path)


def test_a_map_of_precisions_is_a_precision_to_compare(tuned, tmp_path):
    runs = runs_of([0.5, 0.6], [0.5, 0.61], tuned)
    record = record_of(runs)
    assert list(record["equivalent"]) == [tuned]
    assert record["divergence"][0]["epsilon"] == 2.0**-7
    (tmp_path / "parity.json").write_text(json.dumps(record))
    assert f"{tuned}: undecided" in write.write(tmp_path).read_text()


def test_runs_by_a_map_hang_on_what_is_in_it(tuned, tmp_path):
    question = Question(RECIPE, precisions=("float32", tuned), seeds=1)
    versions = dict.fromkeys(("keras", "tensorflow", "tfamp"), "1")
    before = series.make_jobs(question, tmp_path, versions)
    assert [job.name for job in before] == [
        "float32-seed0",
        "tuned-tune-seed0",
    ]
    assert f"--precision={tuned}" in before[1].arguments
    path = pathlib.Path(tuned)
    path.write_text(path.read_text() + "\n")
    after = series.make_jobs(question, tmp_path, versions)
    assert before[0] == after[0]
    assert before[1].depends_on != after[1].depends_on


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tuned/tune.json", "float8"])
def test_other_precisions_are_evaluated_as_they_trained_too(tuned, precision):
    del tuned
    run = measure(precision)
    assert run["precision"] == precision
    assert run["evaluations_reason"] is None
    assert set(run["evaluations"]) == {*PRECISIONS, precision}
    (evaluation,) = record_of([measure("float32"), run])["evaluations"][1:]
    own = run["metrics"]["accuracy"]
    assert evaluation["metrics_in"][precision] == pytest.approx(own, abs=1e-6)


def test_the_report_shows_verdict_plots_and_tables():
    runs = runs_of([0.9, 0.92, 0.94], [0.901, 0.92, 0.94])
    runs[5]["scale_changes"] = [[1, 65536.0], [2, 32768.0]]
    runs[4]["losses"] = [1.0, None]
    record = record_of(runs)
    json.dumps(record, allow_nan=False)
    part = parity_part.part(json.loads(json.dumps(record)))
    assert part.is_good
    assert part.verdict == "Equivalent to float32: mixed_float16."
    assert " ".join(part.remarks) == record["verdict"]
    assert len(part.plots) == 4
    for plot in part.plots:
        assert plot.svg.startswith("<svg")
        assert plot.caption
        assert plot.alternative
    captions = [table.caption for table in part.tables]
    assert captions[0] == "accuracy at the end"
    assert part.tables[0].rows[1][1:4] == ["0.901", "0.92", "0.94"]
    for table in part.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}


# Which metric.


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["loss", "accuracy", "loss_scale"], "accuracy"),
        (["top5_accuracy", "accuracy"], "accuracy"),
        (["perplexity", "loss"], "loss"),
        (["loss_scale", "skipped_steps", "iou"], "iou"),
    ],
)
def test_an_accuracy_is_judged_or_else_the_loss(names, chosen):
    assert choose_metric(names, None) == chosen


def test_a_metric_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(InputError, match="'f1'; expected one of loss, iou"):
        choose_metric(["loss", "iou"], "f1")
    with pytest.raises(InputError, match="returns no metric"):
        choose_metric(["loss_scale"], None)


@pytest.mark.parametrize(
    ("name", "greater"),
    [
        ("accuracy", True),
        ("mean_io_u", True),
        ("loss", False),
        ("bits_per_byte", False),
        ("perplexity", False),
        ("mean_absolute_error", False),
    ],
)
def test_the_better_side_is_told_by_the_name(name, greater):
    assert is_greater_better(name) == greater


# The command.


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--precisions=float32,float16"], ["'float16'", "mixed_float16"]),
        (["--precisions=float32,float32"], ["'float32' is named twice"]),
        (["--precisions=mixed_bfloat16"], ["float32, the reference"]),
        (["--precisions=float32"], ["at least one other"]),
        (["--seeds=0"], ["seeds=0"]),
        (["--margin=0"], ["margin=0"]),
        (["--alpha=0.7"], ["alpha=0.7"]),
        (["--greater_is_better=maybe"], ["maybe"]),
        (["--config.epoch=1"], ["--epoch.", "--epochs"]),
        (["--config.epochs=x"], ["--epochs=x"]),
        (["--config.seed=1"], ["--seed=1", "--seeds"]),
        (["--config.checkpoint_dir=x"], ["--checkpoint_dir=x"]),
        (["--precision_map=x.json"], ["--precisions=float32,", "x.json"]),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    capsys, tmp_path, argv, named
):
    folder = tmp_path / "out"
    argv = ["parity", RECIPE, f"--output_dir={folder}", *argv]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for word in named:
        assert word in err
    assert not folder.exists()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A parity that was killed in its second run: the folder, the command."""
    folder = tmp_path_factory.mktemp("killed") / "out"
    command = [
        *("parity", RECIPE, f"--output_dir={folder}", "--seeds=2"),
        *("--precisions=float32,mixed_bfloat16", "--config.behave=same"),
    ]
    process = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys; from tfamp.cli import main; sys.exit(main())",
            *command,
        ],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = folder / "runs" / "mixed_bfloat16-seed0" / "log.txt"
    wait_for(lambda: log.exists() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # Its run is in a group of its own, and ends all the same.
    wait_for(lambda: not processes_about(folder), seconds=30)
    return folder, command


def processes_about(folder):
    """The command lines of running processes that name the folder."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            if os.fsencode(folder) in line:
                found.append(line)
    return found


@pytest.mark.slow
def test_killed_and_started_again_it_repeats_no_finished_run(
    killed, capfd, fits_schema
):
    folder, command = killed
    finished = folder / "runs" / "float32-seed0" / "result.json"
    written = finished.stat().st_mtime_ns
    assert not (folder / "parity.json").exists()

    assert cli.main(command) == 0

    out, err = capfd.readouterr()
    assert "1/4  1 finished before" in err
    assert finished.stat().st_mtime_ns == written
    record = json.loads((folder / "parity.json").read_text())
    fits_schema(record)
    # The recipe ignores its precision: the run that was killed, done again,
    # equals the one that was finished before.
    assert record["equivalent"] == {"mixed_bfloat16": True}
    assert record["tests"][0]["method"] == "identical"
    assert record["config"]["behave"] == "same"
    assert record["verdict"] in out
    assert record["verdict"] in (folder / "report.html").read_text()


@pytest.fixture
def finished(killed):
    """The same, whoever ran it to its end."""
    folder, command = killed
    if not (folder / "parity.json").exists():
        assert cli.main(command) == 0
    return folder, command


@pytest.mark.slow
def test_a_finished_folder_answers_at_once_and_the_same(finished, capfd):
    folder, command = finished
    before = json.loads((folder / "parity.json").read_text())
    assert cli.main(command) == 0
    after = json.loads((folder / "parity.json").read_text())
    del before["environment"], after["environment"]
    assert before == after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--metric=f1", "'f1'; expected one of loss, accuracy"),
        ("--config.epochs=3", "this one has --config.epochs=3"),
    ],
)
def test_a_folder_that_does_not_fit_the_command_is_left_alone(
    finished, capsys, change, named
):
    folder, command = finished
    before = (folder / "parity.json").read_bytes()
    assert cli.main([*command, change]) == 2
    err = capsys.readouterr().err
    assert named in err.splitlines()[-1]
    assert (folder / "parity.json").read_bytes() == before
