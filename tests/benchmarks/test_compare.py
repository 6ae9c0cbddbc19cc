"""The comparison with stock Keras and PyTorch: one model, honest figures."""

import dataclasses
import math
import subprocess
import sys

import keras
import numpy as np
import pytest

from benchmarks.compare import (
    __main__ as program,
)
from benchmarks.compare import (
    figures,
    frameworks,
    goals,
    keras_networks,
    keras_training,
    measuring,
    race,
    sameness,
    tables,
)
from benchmarks.compare.cases import (
    FULL,
    QUICK,
    AdamW,
    Case,
    Gpt,
    Mlp,
    ResNet50,
    Sgd,
    UNet,
    make_batches,
)
from benchmarks.compare.contestants import CONTESTANTS
from benchmarks.compare.turns import Schedule, Turns
from recipes.transformer import RotaryAttention
from tests.conftest import ROOT
from tfamp.analysis.jobs.progress import JobProgress

_ADAMW = AdamW(learning_rate=1e-3, weight_decay=0.1)
TINY = {
    "resnet50": Case("resnet50", ResNet50(32, 10), 8, Sgd(1e-3, 0.9), 1),
    "gpt": Case("gpt", Gpt(2, 32, 4, 16, 64), 4, _ADAMW, 1),
    "unet": Case("unet", UNet(16, (4, 8, 16), 5), 4, _ADAMW, 1),
    "mlp": Case("mlp", Mlp((8, 16, 16, 4)), 16, _ADAMW, 1),
}
BY_NAME = {each.name: each for each in CONTESTANTS}


class Losses:
    """In the place of `Turns`: keeps the losses."""

    def __init__(self):
        self.losses = []

    def begin_epoch(self):
        pass

    def end_epoch(self, loss):
        self.losses.append(loss)


def torch_training():
    """The module; it is skipped where the extra is not installed."""
    pytest.importorskip("torch", reason="PyTorch is the extra `torch`")
    from benchmarks.compare import torch_training

    return torch_training


@pytest.mark.parametrize("name", TINY)
def test_keras_and_torch_have_the_same_losses_step_after_step(name, tmp_path):
    training, case = torch_training(), TINY[name]
    model = keras_networks.build(case.network)
    weights = tmp_path / "weights.npz"
    np.savez(weights, **keras_networks.named_weights(model))
    model.compile(
        optimizer=keras_networks.make_optimizer(case),
        loss=keras_networks.make_loss(),
        # Tracing takes longer than three steps.
        run_eagerly=True,
    )
    ours = [float(model.train_on_batch(*b)) for b in make_batches(case)[:3]]
    theirs = Losses()
    training.train(
        BY_NAME["torch"],
        case,
        "float32",
        3,
        theirs,
        device="cpu",
        weights=weights,
    )
    # Batch norms over few rows magnify rounding, at each step.
    tolerance = 2e-3 if name == "resnet50" else 2e-5
    np.testing.assert_allclose(theirs.losses, ours, rtol=tolerance)
    np.testing.assert_allclose(theirs.losses[0], ours[0], rtol=2e-5)


@pytest.mark.slow
def test_stock_keras_attends_by_its_own_operation(monkeypatch):
    case = TINY["gpt"]
    theirs, ours = (keras_networks.build(case.network) for _ in range(2))
    keras_networks.leave_to_keras(theirs)
    tokens, _ = make_batches(case)[0]
    np.testing.assert_allclose(theirs(tokens), ours(tokens), rtol=1e-5)

    def refuse(*args, **kwargs):
        raise AssertionError("tfamp's attention ran")

    def build(network):
        # It attends while it is built: the refusal comes after.
        model = original_build(network)
        monkeypatch.setattr(RotaryAttention, "attend", staticmethod(refuse))
        return model

    original_build = keras_networks.build
    monkeypatch.setattr(keras_networks, "build", build)
    losses = Losses()
    keras_training.train(BY_NAME["keras"], case, "float32", 1, losses)
    assert len(losses.losses) == 1
    with pytest.raises(AssertionError, match="tfamp's attention ran"):
        ours(tokens)


@pytest.mark.parametrize("name", ["gpt", "unet", "mlp"])
def test_keras_and_torch_count_the_same_weights_and_operations(name, tmp_path):
    torch_training()
    case = TINY[name]
    ours = sameness.keras_facts(case, tmp_path / "weights.npz")
    theirs = sameness.torch_facts(case)
    for count in ("parameters", "flops"):
        assert ours[f"keras_{count}"] == theirs[f"torch_{count}"]


def test_weights_that_do_not_fit_are_an_error():
    torch_training()
    from benchmarks.compare import torch_networks, torch_weights

    weights = keras_networks.named_weights(
        keras_networks.build(TINY["mlp"].network)
    )
    wider = torch_networks.build(Mlp((8, 32, 16, 4)))
    with pytest.raises(ValueError, match=r"\(16, 8\) in Keras.*\(32, 8\)"):
        torch_weights.load(wider, weights)
    shorter = torch_networks.build(Mlp((8, 16)))
    with pytest.raises(ValueError, match=r"Only in Keras: .*Dense1/kernel"):
        torch_weights.load(shorter, weights)
    longer = torch_networks.build(Mlp((8, 16, 16, 4, 4)))
    with pytest.raises(ValueError, match="no Dense3/kernel"):
        torch_weights.load(longer, weights)


def test_a_process_of_torch_has_no_tensorflow_in_its_memory():
    torch_training()
    script = (
        "import sys; "
        "import benchmarks.compare.process, benchmarks.compare.torch_training; "
        "print([m for m in ('keras', 'tensorflow') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=ROOT,
    )
    assert result.stdout.strip() == "[]"


def test_every_model_has_a_quick_twin_of_the_same_kind():
    assert [each.name for each in FULL] == [each.name for each in QUICK]
    for full, quick in zip(FULL, QUICK, strict=True):
        assert type(full.network) is type(quick.network)
        assert full.optimizer == quick.optimizer


def test_logits_are_float32_under_every_policy():
    keras.config.set_dtype_policy("mixed_bfloat16")
    for name in ("gpt", "unet", "mlp"):
        model = keras_networks.build(TINY[name].network)
        x, y = make_batches(TINY[name])[0]
        logits = model(x)
        assert logits.dtype == "float32"
        assert logits.shape[:-1] == y.shape


class Clock:
    """Seconds that stand still unless told otherwise."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Gauge:
    """Counts what is asked of it."""

    def __init__(self):
        self.calls = []

    def in_use(self):
        return 0

    def begin(self):
        self.calls.append("begin")

    def peak(self):
        return 10 * self.calls.count("begin")

    def release(self):
        self.calls.append("release")


def test_a_turn_times_its_epochs_but_the_first_and_waits_before_it():
    clock, cpu, gauge, reports = Clock(), Clock(), Gauge(), []

    def wait():
        clock.seconds += 100
        cpu.seconds += 1

    schedule = Schedule(rounds=2, timed_epochs=2)
    turns = Turns(schedule, gauge, wait, reports.append, clock, cpu)
    for epoch in range(schedule.epochs):
        turns.begin_epoch()
        clock.seconds += epoch
        turns.end_epoch(loss=-epoch)
    start, first, second = reports
    assert start["start_seconds"] == [0, 1]
    assert start["losses"] == [0, -1]
    assert first["epoch_seconds"] == [3, 4]
    assert first["losses"] == [-2, -3, -4]
    assert second["epoch_seconds"] == [6, 7]
    assert second["waiting_seconds"] == 100
    assert second["waiting_cpu_seconds"] == 1
    # The peak is one of the timed epochs: it begins anew after the warm-up.
    turn = ["release", "begin"]
    assert gauge.calls == ["begin", "begin", *turn, *turn]


def turn_of(contestant, number, milliseconds, memory, precision="float32"):
    """What a process tells of a turn of four steps an epoch."""
    seconds = 4 * milliseconds / 1000
    return {
        "contestant": contestant,
        "precision": precision,
        "round": number,
        # The median is to be taken.
        "epoch_seconds": [seconds, 9 * seconds, seconds / 2],
        "peak_memory_bytes": memory + 1000,
        "memory_before_bytes": 1000,
        "waiting_seconds": 10.0,
        "waiting_cpu_seconds": 0.5,
    }


def made_up_runs():
    turns = [
        turn_of("keras", 1, 10, 200),
        turn_of("keras_loop", 1, 8, 200),
        turn_of("tfamp", 1, 6, 100),
        turn_of("torch", 1, 12, 50),
        turn_of("torch", 2, 12, 50),
        # A busy machine: all take twice as long.
        turn_of("tfamp", 2, 12, 100),
        turn_of("keras_loop", 2, 16, 200),
        turn_of("keras", 2, 20, 200),
        turn_of("tfamp", 1, 3, 60, "mixed_bfloat16"),
        turn_of("tfamp", 2, 6, 60, "mixed_bfloat16"),
    ]
    return [figures.run_of("mlp", 4, turn) for turn in turns]


def test_ratios_are_taken_round_by_round():
    rows = {
        (row["contestant"], row["precision"]): row
        for row in figures.summarize(made_up_runs())
    }
    tfamp = rows["tfamp", "float32"]
    assert tfamp["step_milliseconds"]["median"] == 9
    assert tfamp["step_milliseconds"]["lowest"] == 6
    assert tfamp["step_milliseconds"]["highest"] == 12
    assert tfamp["memory_growth_bytes"]["median"] == 100
    keras_ratio = tfamp["ratios"]["keras"]
    assert keras_ratio["time"]["rounds"] == pytest.approx([0.6, 0.6])
    assert keras_ratio["memory"]["median"] == 0.5
    best = tfamp["ratios"]["best_keras"]
    assert best["against"] == "keras_loop"
    assert best["time"]["rounds"] == pytest.approx([0.75, 0.75])
    assert tfamp["ratios"]["torch"]["time"]["rounds"] == [0.5, 1.0]
    assert "float32" not in tfamp["ratios"]
    assert "bare" not in tfamp["ratios"]
    sixteen = rows["tfamp", "mixed_bfloat16"]["ratios"]
    assert sixteen["float32"]["time"]["rounds"] == [0.5, 0.5]
    # Nobody else ran in bfloat16.
    assert list(sixteen) == ["float32"]
    # The fastest is not compared with itself.
    assert "best_keras" not in rows["keras_loop", "float32"]["ratios"]


def test_a_contestant_that_missed_a_round_is_compared_in_the_others():
    runs = [
        r
        for r in made_up_runs()
        if (r["contestant"], r["round"]) != ("keras", 1)
    ]
    (row,) = [
        row
        for row in figures.summarize(runs)
        if (row["contestant"], row["precision"]) == ("tfamp", "float32")
    ]
    assert row["ratios"]["keras"]["time"]["rounds"] == [0.6]


def test_goals_are_judged_where_they_were_measured():
    found = goals.judge(figures.summarize(made_up_runs()))
    (goal,) = found
    assert goal["contestant"] == "tfamp"
    assert goal["what"] == "tfamp / best stock Keras, time"
    assert goal["precision"] == "float32"
    assert goal["measured"] == pytest.approx(0.75)
    assert goal["reached"]


def record_of(runs):
    """A record as `measuring.measure` makes it, of made-up runs."""
    summary = figures.summarize(runs)
    start = {"precision": "float32", "losses": [2.0, 1.0]}
    return {
        "schema": measuring.SCHEMA,
        "quick": True,
        "device": "cpu",
        "threads": 3,
        "rounds": 2,
        "environment": {
            "command": "python -m benchmarks.compare --quick",
            "time": "2026-01-02T03:04:05",
            "hardware": None,
            "versions": {"tfamp": "1"},
        },
        "models": [
            {
                "name": "mlp",
                "title": "a small MLP",
                "keras_parameters": 1234,
                "keras_flops": 5_000_000,
                "torch_parameters": 1234,
                "torch_flops": 5_000_000,
            }
        ],
        "starts": [
            {
                "model": "mlp",
                "contestant": "tfamp",
                "compile_seconds": 2.5,
                **start,
            }
        ],
        "runs": runs,
        "losses": [
            {"model": "mlp", **each}
            for each in sameness.loss_differences(
                [
                    {"contestant": "keras", **start},
                    {"contestant": "tfamp", **start},
                ]
            )
        ],
        "failures": [],
        "summary": summary,
        "goals": goals.judge(summary),
    }


def test_the_page_shows_medians_ratios_and_that_it_was_quick():
    text = tables.to_markdown(record_of(made_up_runs()))
    assert "No figure here is one to quote" in text
    assert "- command: python -m benchmarks.compare --quick" in text
    assert (
        "| tfamp, float32 | 9 | 6 to 12 | 0.600 | 0.750 | 0.750 | 0.750 | - "
        "| 0 | 2.000 |" in text
    )
    assert "| mlp | 1,234 | 1,234 | 0.005 | 0.005 | 0.0e+00 | - |" in text
    goal = "| tfamp / best stock Keras, time | tfamp | mlp | float32 |"
    assert goal in text
    assert "- `keras_loop`: Model.fit, steps_per_execution" in text


def test_the_plot_names_models_and_contestants():
    pytest.importorskip("matplotlib")
    from benchmarks.compare import plot

    svg = plot.step_times(record_of(made_up_runs()))
    for word in ("a small MLP", "keras_loop", "tfamp", "mixed_bfloat16"):
        assert word in svg


def test_losses_that_differ_tell_another_model():
    starts = [
        {
            "contestant": "torch",
            "precision": "mixed_bfloat16",
            "losses": [2, 1],
        },
        {"contestant": "keras", "precision": "float32", "losses": [2, 1]},
        {"contestant": "tfamp", "precision": "float32", "losses": [2, 1.01]},
        {
            "contestant": "keras",
            "precision": "mixed_bfloat16",
            "losses": [2, 1.01],
        },
        {
            "contestant": "torch",
            "precision": "float32",
            "losses": [2, math.nan],
        },
    ]
    found = sameness.loss_differences(starts)
    assert [each["agrees"] for each in found] == [
        True,
        True,
        False,
        True,
        False,
    ]
    assert found[3]["difference"] == pytest.approx(0.01)
    assert found[4]["difference"] is None
    record = record_of(made_up_runs())
    assert measuring.complaint(record) is None
    record["losses"] = [{"model": "mlp", **each} for each in found]
    assert "tfamp float32 does not train the mlp" in measuring.complaint(record)
    record["losses"] = record["losses"][-1:]
    assert "its first losses are no numbers" in measuring.complaint(record)
    assert tables.to_markdown(record)


def test_counts_that_differ_tell_another_model():
    record = record_of(made_up_runs())
    record["models"][0]["torch_flops"] += 1
    assert "5000000 flops in Keras" in measuring.complaint(record)


def test_a_failure_is_told_first():
    record = record_of(made_up_runs())
    record["failures"] = [
        {
            "model": "mlp",
            "contestant": "torch_compile",
            "precision": "float32",
            "line": "no compiler",
        }
    ]
    assert "torch_compile float32 failed on mlp: no compiler" in (
        measuring.complaint(record)
    )
    assert "| torch_compile, float32 | mlp | no compiler |" in (
        tables.to_markdown(record)
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--models=resnet"],
            "Unknown model 'resnet'; expected some of resnet50",
        ),
        (
            ["--contestants=keras,jax"],
            "Unknown contestant 'jax'; expected some",
        ),
        (["--contestants=tfamp,tfamp"], "Contestant 'tfamp' is named twice"),
        (
            ["--precisions=float8"],
            "precisions=float8; expected some of float32",
        ),
        (["--threads=4096"], "threads=4096 is more than the"),
        (["--rounds=0"], "rounds=0 is out of range"),
        (["--device=tpu"], "expected one of cpu, gpu"),
        (["--contestants=keras", "--output_dir=gs://a"], "not a local folder"),
    ],
)
def test_bad_flags_get_one_line_and_status_2(flags, message, capsys):
    assert program.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_gpu_that_one_framework_does_not_see_is_bad_input(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(
        frameworks,
        "_LOOK",
        {"TensorFlow": "print('GPU:0')", "PyTorch": "import no_such_module"},
    )
    monkeypatch.setattr(frameworks.importlib.util, "find_spec", lambda name: 1)
    folder = tmp_path / "results"
    flags = ["--device=gpu", f"--output_dir={folder}"]
    assert program.main([*flags, "--contestants=keras,torch"]) == 2
    assert capsys.readouterr().err == (
        "tfamp: device=gpu: PyTorch sees no GPU here; use --device=cpu.\n"
    )
    assert not folder.exists()


def test_without_torch_a_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(
        frameworks.importlib.util, "find_spec", lambda name: None
    )
    assert program.main(["--contestants=tfamp,torch"]) == 2
    assert capsys.readouterr().err == (
        "tfamp: PyTorch is not installed: pip install 'tfamp[torch]', or leave "
        "it out with --contestants=tfamp.\n"
    )


def test_torch_compile_asks_for_a_compiler_first(monkeypatch, capsys):
    monkeypatch.setattr(frameworks.importlib.util, "find_spec", lambda name: 1)
    monkeypatch.setattr(frameworks.shutil, "which", lambda name: None)
    assert program.main(["--contestants=torch_compile"]) == 2
    assert "needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.slow
def test_contestants_take_turns_and_one_that_fails_is_left_out(
    tmp_path, capsys
):
    case = dataclasses.replace(TINY["mlp"], steps=2)
    plan = measuring.Plan(
        cases=[case],
        # Its weights are missing, as is PyTorch itself without the extra.
        contestants=[
            BY_NAME[n] for n in ("keras_loop", "tfamp_optimized", "torch")
        ],
        precisions=["float32"],
        device="cpu",
        threads=1,
        schedule=Schedule(rounds=2, timed_epochs=1),
    )
    entries = plan.entries(case, tmp_path)
    parts = [(race.start_name(each), "start") for each in entries]
    parts += [(race.round_name(entries[0], n), "round") for n in (1, 2)]
    with JobProgress(parts) as progress:
        outcome = race.run(entries, progress)
    assert "mlp, round 2" in capsys.readouterr().err
    (failure,) = outcome.failures
    assert failure["contestant"] == "torch"
    assert failure["line"].split(":")[0] in (
        "FileNotFoundError",
        "ModuleNotFoundError",
    )
    # Backwards in each second round.
    order = [(turn["round"], turn["contestant"]) for turn in outcome.turns]
    assert order == [
        (1, "keras_loop"),
        (1, "tfamp_optimized"),
        (2, "tfamp_optimized"),
        (2, "keras_loop"),
    ]
    by_name = {start["contestant"]: start for start in outcome.starts}
    np.testing.assert_allclose(
        by_name["tfamp_optimized"]["losses"],
        by_name["keras_loop"]["losses"],
        rtol=1e-5,
    )
    for turn in outcome.turns:
        assert len(turn["epoch_seconds"]) == 1
        assert turn["peak_memory_bytes"] > turn["memory_before_bytes"]
        assert (
            turn["waiting_cpu_seconds"] < 0.1 * turn["waiting_seconds"] + 0.05
        )
        run = figures.run_of("mlp", case.steps, turn)
        assert run["step_milliseconds"] > 0


def test_a_process_that_may_not_fit_is_not_started(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4096 kB\nMemAvailable: 1024 kB\n")
    monkeypatch.setattr(race, "_MEMINFO", meminfo)
    start = {"peak_memory_bytes": 600 * 1024}
    assert race._shortage(race.Outcome([start], [], []), 1) is None
    start = {"peak_memory_bytes": 700 * 1024}
    line = race._shortage(race.Outcome([start, start], [], []), 1)
    assert "beside 2 processes" in line
