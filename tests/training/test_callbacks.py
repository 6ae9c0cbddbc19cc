import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tfamp.files import output
from tfamp.recipe import flag
from tfamp.training import callbacks, progress_bar, run_record

LOGS = {
    "loss": 0.5,
    "accuracy": 0.75,
    "loss_scale": 65536.0,
    "skipped_steps": 3,
    "examples_per_second": 12345.6,
    "step_milliseconds": 4.21,
}
EPOCH_LOGS = {**LOGS, "val_loss": 0.25, "val_accuracy": 1.0}


def small_model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def drive(*parts, epochs=(0, 1), steps=4, logs=EPOCH_LOGS, ends=True):
    """What a training loop tells its callbacks, without the training."""
    told = keras.callbacks.CallbackList(
        list(parts), model=small_model(), epochs=len(epochs), steps=steps
    )
    told.on_train_begin()
    for epoch in epochs:
        told.on_epoch_begin(epoch)
        told.on_train_batch_end(1, LOGS)
        told.on_train_batch_end(3, LOGS)
        told.on_test_begin()
        told.on_test_end()
        told.on_epoch_end(epoch, logs)
    if ends:
        told.on_train_end()


def json_lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def table(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def started_bar():
    bar = callbacks.ProgressBar()
    bar.set_params({"epochs": 1, "steps": 9})
    bar.on_train_begin()
    bar.on_epoch_begin(0)
    return bar


# ProgressBar


def test_without_a_terminal_an_epoch_is_one_plain_line(capsys):
    drive(callbacks.ProgressBar())
    lines = capsys.readouterr().out.splitlines()
    figures = (
        "loss 0.5000  accuracy 0.7500  val_loss 0.2500  val_accuracy 1.0000  "
        "scale 2^16  skipped 3  12,346 examples/s  4.21 ms/step"
    )
    assert lines == [f"epoch {n}/2  {figures}  0.0 s" for n in (1, 2)]


def test_forced_color_puts_no_control_character_into_a_pipe(
    capsys, monkeypatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    drive(callbacks.ProgressBar())
    out = capsys.readouterr().out
    assert out.count("\n") == 2
    assert out.replace("\n", "").isprintable()


def test_a_terminal_gets_a_bar_and_a_line_that_stays(terminal):
    with contextlib.redirect_stdout(terminal):
        drive(callbacks.ProgressBar(), epochs=[0])
    shown = terminal.getvalue()
    assert "4/4" in shown
    assert "scale 2^16  skipped 3  12,346 examples/s" in shown
    assert "epoch 1/1 validation" in shown
    *_, last_line = shown.splitlines()
    assert "val_accuracy 1.0000" in last_line
    # The bar's two rows are gone: nothing erases after the line is written.
    assert "\x1b" not in last_line.split("epoch 1/1  loss")[1]


def test_one_line_per_epoch_holds_on_a_terminal_too(terminal):
    with contextlib.redirect_stdout(terminal):
        drive(callbacks.ProgressBar(one_line_per_epoch=True))
    assert terminal.getvalue().count("\n") == 2
    assert terminal.getvalue().replace("\n", "").isprintable()


def test_the_number_of_steps_is_learned_in_the_first_epoch(terminal):
    with contextlib.redirect_stdout(terminal):
        drive(callbacks.ProgressBar(), steps=None)
    first, second = terminal.getvalue().split("epoch 1/2  loss")
    assert "4/?" in first
    assert "4/4" in second


def test_a_batch_without_new_logs_moves_the_bar_on(terminal):
    with contextlib.redirect_stdout(terminal):
        bar = started_bar()
        bar.on_train_batch_end(1, LOGS)
        bar.on_train_batch_end(6, None)
        bar.close()
    last_picture = terminal.getvalue().split("epoch 1/1")[-1]
    assert "7/9" in last_picture
    assert "loss 0.5000" in last_picture


def test_a_line_fits_a_narrow_terminal(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    many = EPOCH_LOGS | {f"a_metric_{n}": 0.5 for n in range(6)}
    with contextlib.redirect_stdout(terminal):
        bar = callbacks.ProgressBar(one_line_per_epoch=True)
        drive(bar, epochs=[0])
        drive(bar, epochs=[0], logs=many)
    shown = terminal.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    # What there is no room for is the speed, and never a metric.
    assert "examples/s" not in shown
    assert shown.count("val_accuracy 1.0000") == 2
    assert "a_metric_5 0.5000" in shown


def test_a_pipe_gets_a_line_now_and_then_in_a_long_epoch(capsys, monkeypatch):
    monkeypatch.setattr(progress_bar, "_PIPE_SECONDS", 0.01)
    bar = started_bar()
    time.sleep(0.2)
    bar.on_train_batch_end(1, LOGS)
    time.sleep(0.2)
    bar.close()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "epoch 1/1  0/9  0 s  waiting for the first step"
    assert re.match(r"epoch 1/1  2/9  \d s, \d s left  loss 0.5000", last)


def test_a_notebook_gets_one_line_that_is_written_over(capsys, monkeypatch):
    monkeypatch.setattr(progress_bar, "_NOTEBOOK_SECONDS", 0.01)
    monkeypatch.setattr(progress_bar, "_is_notebook", lambda: True)
    bar = started_bar()
    time.sleep(0.2)
    bar.on_epoch_end(0, LOGS)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    *_, before, blank, line = out.split("\r")
    assert before.rstrip() == (
        f"epoch 1/1  {20 * '─'} 0/9  0 s  waiting for the first step"
    )
    assert len(blank) >= len(before.rstrip())
    assert blank.isspace()
    assert line.startswith("epoch 1/1  loss 0.5000")


def test_a_notebook_sees_a_bar_and_whole_figures(capsys, monkeypatch):
    monkeypatch.setattr(progress_bar, "_NOTEBOOK_SECONDS", 0.01)
    monkeypatch.setattr(progress_bar, "_is_notebook", lambda: True)
    bar = started_bar()
    many = LOGS | {f"a_metric_{n}": 0.5 for n in range(9)}
    for step, logs in ((3, LOGS), (6, many)):
        bar.on_train_batch_end(step, logs)
        time.sleep(0.1)
    bar.close()
    shown = re.sub(r"\d s, \d s left", "TIME", capsys.readouterr().out)
    lines = [line.rstrip() for line in shown.split("\r")]
    fourth = f"epoch 1/1  {8 * '━'}{12 * '─'} 4/9  TIME"
    # For the speed there is no room.
    figures = "loss 0.5000  accuracy 0.7500  scale 2^16"
    assert f"{fourth}  {figures}" in lines
    seventh = f"epoch 1/1  {15 * '━'}{5 * '─'} 7/9  TIME"
    figures = "loss 0.5000  accuracy 0.7500  a_metric_0 0.5000"
    assert lines[-1] == f"{seventh}  {figures}"
    assert max(map(len, lines)) <= 100 - len("0 s, 0 s left") + len("TIME")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99.4, "99 s"), (242, "4:02"), (3842, "1:04:02")],
)
def test_a_time_is_told_in_few_characters(seconds, text):
    assert progress_bar._time(seconds) == text


def test_averaged_weights_are_evaluated_for_a_last_line(capsys):
    model = small_model()
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, "mse")
    x, y = np.ones((4, 2), "float32"), np.zeros((4, 1), "float32")
    tfamp.fit(model, x, y, validation_data=(x, y), epochs=1)
    *_, last = capsys.readouterr().out.splitlines()
    expected = float(np.mean(model(x).numpy() ** 2))
    assert last == f"final (averaged weights)  val_loss {expected:.4f}"


def test_close_gives_the_cursor_back_and_may_be_repeated(terminal):
    hide, show = "\x1b[?25l", "\x1b[?25h"
    callbacks.ProgressBar().close()
    with contextlib.redirect_stdout(terminal):
        bar = started_bar()
        assert terminal.getvalue().count(hide) == 1
        assert show not in terminal.getvalue()
        bar.close()
        bar.close()
        assert sys.stdout is terminal
    assert terminal.getvalue().count(show) == 1


def test_a_bar_that_is_dropped_gives_the_cursor_back(terminal):
    with contextlib.redirect_stdout(terminal):
        bar = started_bar()
        del bar
    assert "\x1b[?25h" in terminal.getvalue()


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"loss_scale": 1.0, "skipped_steps": 0}, ""),
        ({"loss_scale": 1.0, "skipped_steps": 2}, "skipped 2"),
        ({"loss_scale": 8.0, "skipped_steps": 0}, "scale 2^3  skipped 0"),
        ({"loss_scale": 1000.0}, "scale 1000"),
        ({"loss_scale": 0.0}, "scale 0"),
        ({"loss_scale": math.inf}, "scale inf"),
        ({"peak_memory_bytes": 3 * 2**29}, "1.50 GiB"),
        ({"step_milliseconds": 1234.5}, "1,234 ms/step"),
        ({"loss": math.nan}, "loss nan"),
        ({"loss": 1e-5, "mse": 2e6}, "loss 1.000e-05  mse 2.000e+06"),
        ({"accuracy": 1.0, "loss": 0.0}, "loss 0.0000  accuracy 1.0000"),
    ],
)
def test_figures_are_formatted_by_their_unit(logs, line):
    assert callbacks.format_figures(logs) == line


# MetricsLog


def test_every_epoch_is_one_json_line_and_one_csv_row(tmp_path):
    drive(callbacks.MetricsLog(tmp_path / "new" / "run"))
    lines = json_lines(tmp_path / "new" / "run")
    assert [line["epoch"] for line in lines] == [0, 1]
    assert {key: lines[1][key] for key in EPOCH_LOGS} == EPOCH_LOGS
    assert lines[0]["time"] < lines[1]["time"]
    assert 0 <= lines[0]["elapsed_seconds"] <= lines[1]["elapsed_seconds"]
    rows = table(tmp_path / "new" / "run")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["val_accuracy"]) == 1.0


def test_the_rate_that_an_epoch_ended_with_is_logged(tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 4, 0.5)
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    optimizer = tfamp.wrap_optimizer(keras.optimizers.SGD(schedule))
    model.compile(optimizer, "mse")
    parts = [
        callbacks.MetricsLog(tmp_path),
        callbacks.TensorBoardScalars(tmp_path),
    ]
    x = np.ones([8, 1], "float32")
    history = tfamp.fit(
        model, x, x, batch_size=2, epochs=2, callbacks=parts, verbose=0
    )
    # Halved by each epoch of 4 steps.
    rates = [line["learning_rate"] for line in json_lines(tmp_path)]
    assert rates == [0.25, 0.125]
    train = scalars(tmp_path / "tensorboard" / "train")
    assert train["learning_rate"] == [(0, 0.25), (1, 0.125)]
    # Keras's own history has no such key.
    assert "learning_rate" not in history.history


def test_a_resumed_run_appends(tmp_path):
    drive(callbacks.MetricsLog(tmp_path), epochs=[0, 1], ends=False)
    drive(callbacks.MetricsLog(tmp_path), epochs=[2])
    assert [line["epoch"] for line in json_lines(tmp_path)] == [0, 1, 2]
    assert [row["epoch"] for row in table(tmp_path)] == ["0", "1", "2"]


def test_a_key_that_comes_later_keeps_the_columns_apart(tmp_path):
    drive(callbacks.MetricsLog(tmp_path), epochs=[0], logs={"loss": 1.0})
    later = {"a_metric": 2.0, "loss": 3.0}
    drive(callbacks.MetricsLog(tmp_path), epochs=[1], logs=later)
    first, second = table(tmp_path)
    assert (first["loss"], first["a_metric"]) == ("1.0", "")
    assert (second["loss"], second["a_metric"]) == ("3.0", "2.0")


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    logs = {"loss": math.nan, "max": math.inf, "accuracy": np.float32(0.5)}
    drive(callbacks.MetricsLog(tmp_path), epochs=[0], logs=logs)
    text = (tmp_path / "metrics.jsonl").read_text()
    (line,) = [
        json.loads(line, parse_constant=pytest.fail)
        for line in text.splitlines()
    ]
    assert line["loss"] is None
    assert line["max"] is None
    assert line["accuracy"] == 0.5


def test_half_a_line_of_a_crash_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0, "loss": 1.0}\n{"epoch": 1, "lo')
    drive(callbacks.MetricsLog(tmp_path), epochs=[1])
    assert [line["epoch"] for line in json_lines(tmp_path)] == [0, 1]


@pytest.mark.parametrize("text", ["loss: 1.0\n", "5\n"])
def test_a_log_of_another_kind_is_refused_and_left_as_it_is(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(tfamp.InputError, match="not a log of JSON lines"):
        callbacks.MetricsLog(tmp_path)
    assert path.read_text() == text


@pytest.mark.slow
def test_a_killed_run_keeps_the_figures_of_its_finished_epochs(tmp_path):
    program = f"""
import os, signal, keras
from tfamp.callbacks import MetricsLog, TensorBoardScalars
folder = {str(tmp_path)!r}
told = keras.callbacks.CallbackList(
    [MetricsLog(folder), TensorBoardScalars(folder)]
)
told.on_train_begin()
told.on_epoch_begin(0)
told.on_epoch_end(0, {{"loss": 1.0}})
told.on_epoch_begin(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == -9
    assert [line["loss"] for line in json_lines(tmp_path)] == [1.0]
    assert [row["loss"] for row in table(tmp_path)] == ["1.0"]
    assert scalars(tmp_path / "tensorboard" / "train") == {"loss": [(0, 1.0)]}


def test_a_metric_that_is_an_array_is_logged_as_a_list(tmp_path, capsys):
    logs = {"loss": 1.0, "per_class": np.array([0.5, math.nan], "float32")}
    parts = [
        callbacks.ProgressBar(),
        callbacks.MetricsLog(tmp_path),
        callbacks.TensorBoardScalars(tmp_path),
    ]
    drive(*parts, epochs=[0], logs=logs)
    assert json_lines(tmp_path)[0]["per_class"] == [0.5, None]
    assert capsys.readouterr().out == "epoch 1/1  loss 1.0000  0.0 s\n"
    train = scalars(tmp_path / "tensorboard" / "train")
    assert train["loss"] == [(0, 1.0)]
    assert "per_class" not in train


# TensorBoardScalars


def scalars(folder):
    """`{tag: [(step, value)]}` of the event files in a folder."""
    found = {}
    files = [str(path) for path in sorted(folder.glob("events.*"))]
    for record in tf.data.TFRecordDataset(files):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            number = tf.make_ndarray(value.tensor).item()
            found.setdefault(value.tag, []).append((event.step, number))
    return found


def test_train_and_validation_scalars_overlay_under_one_tag(tmp_path):
    drive(callbacks.TensorBoardScalars(tmp_path))
    train = scalars(tmp_path / "tensorboard" / "train")
    validation = scalars(tmp_path / "tensorboard" / "validation")
    assert train["loss"] == [(0, 0.5), (1, 0.5)]
    assert train["loss_scale"] == [(0, 65536.0), (1, 65536.0)]
    assert validation == {
        "loss": [(0, 0.25), (1, 0.25)],
        "accuracy": [(0, 1.0), (1, 1.0)],
    }


def test_a_resumed_run_adds_to_the_same_curves(tmp_path):
    drive(callbacks.TensorBoardScalars(tmp_path), epochs=[0], ends=False)
    drive(callbacks.TensorBoardScalars(tmp_path), epochs=[1])
    train = scalars(tmp_path / "tensorboard" / "train")
    assert sorted(train["loss"]) == [(0, 0.5), (1, 0.5)]


# RunRecord


@dataclasses.dataclass(frozen=True)
class Config:
    batch_size: int = flag(64, "Examples per step.")
    output_dir: str = ""


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def test_the_record_says_what_ran_on_what(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    drive(callbacks.RunRecord(tmp_path, Config(batch_size=32)), ends=False)
    record = record_of(tmp_path)
    assert record["schema"] == "tfamp.run/1"
    assert record["precision"] == "mixed_bfloat16"
    assert record["strategy"] == "DefaultDistributionStrategy"
    assert record["replicas"] == 1
    assert record["versions"]["tensorflow"] == tf.__version__
    assert record["versions"]["keras"] == keras.__version__
    assert record["versions"]["tfamp"] == tfamp.__version__
    assert set(record["versions"]) >= {"python", "numpy"}
    assert record["hardware"]["kind"] in ("cpu", "gpu", "tpu")
    assert record["config"] == {"batch_size": 32, "output_dir": ""}
    assert record["start_time"].endswith("+00:00")
    assert record["end_time"] is None
    assert record["exit_reason"] is None


def test_the_record_names_the_strategy_and_its_replicas(tmp_path, strategy):
    with strategy.scope():
        drive(callbacks.RunRecord(tmp_path), epochs=[0])
    record = record_of(tmp_path)
    assert record["strategy"] == "MirroredStrategy"
    assert record["replicas"] == strategy.num_replicas_in_sync


def test_the_end_of_training_completes_the_record(tmp_path):
    drive(callbacks.RunRecord(tmp_path), logs={**LOGS, "bad": math.nan})
    record = record_of(tmp_path)
    assert record["exit_reason"] == "finished"
    assert record["final_metrics"] == {**LOGS, "bad": None}
    assert record["start_time"] < record["end_time"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_end_run_leaves_the_record_of_an_earlier_run_alone(tmp_path):
    drive(callbacks.RunRecord(tmp_path))
    before = (tmp_path / "run.json").read_bytes()
    run_record.end_run(tmp_path, "interrupted", started_since=output.utc_now())
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("text", ["[]", "no json", '{"schema": "other/1"}'])
def test_end_run_leaves_the_file_of_another_tool_alone(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    run_record.end_run(tmp_path, "interrupted")
    assert (tmp_path / "run.json").read_text() == text


def test_a_write_that_fails_leaves_the_old_record(
    tmp_path, monkeypatch, warnings_of_absl
):
    drive(callbacks.RunRecord(tmp_path), ends=False)
    before = (tmp_path / "run.json").read_bytes()

    def no_space(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    run_record.end_run(tmp_path, "finished")
    assert (tmp_path / "run.json").read_bytes() == before
    assert "No space left on device" in warnings_of_absl[0]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with one commit, and the process inside it."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "recipe.py").write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "recipe.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    return folder


def test_the_record_holds_the_commit_and_whether_files_differ(
    checkout, tmp_path
):
    (checkout / "untracked.txt").write_text("")
    drive(callbacks.RunRecord(tmp_path / "clean"), epochs=[])
    (checkout / "recipe.py").write_text("changed = True\n")
    drive(callbacks.RunRecord(tmp_path / "changed"), epochs=[])
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True)
    commit = head.strip()
    assert record_of(tmp_path / "clean")["git"] == {
        "commit": commit,
        "dirty": False,
    }
    assert record_of(tmp_path / "changed")["git"] == {
        "commit": commit,
        "dirty": True,
    }


def test_the_commit_is_null_without_git(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    drive(callbacks.RunRecord(tmp_path / "out"), epochs=[])
    assert record_of(tmp_path / "out")["git"] is None


# Folders that cannot be written

WRITERS = [
    callbacks.MetricsLog,
    callbacks.RunRecord,
    callbacks.TensorBoardScalars,
]


@pytest.mark.parametrize("writer", WRITERS)
def test_an_output_dir_below_a_file_is_refused_at_construction(
    writer, tmp_path
):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(tfamp.InputError, match="is not a folder"):
        writer(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("writer", WRITERS)
def test_an_output_dir_without_permission_is_refused_at_construction(
    writer, tmp_path, monkeypatch
):
    # Root may write everywhere, so the system's answer is given for it.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(tfamp.InputError, match="no permission"):
        writer(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_refusal_by_the_system_comes_before_the_first_step(writer):
    part = writer("/proc/tfamp-cannot-be-here")
    with pytest.raises(tfamp.InputError, match="cannot be written") as error:
        drive(part, epochs=[])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_remote_output_dir_is_refused(writer):
    with pytest.raises(tfamp.InputError, match="not a local folder"):
        writer("gs://bucket/run")


@pytest.mark.parametrize("writer", WRITERS)
def test_construction_makes_nothing(writer, tmp_path):
    writer(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_every_callback_works_in_stock_keras_fit(tmp_path, capsys):
    model = small_model()
    x, y = np.ones((8, 2), "float32"), np.ones((8, 1), "float32")
    parts = [
        callbacks.ProgressBar(),
        callbacks.RunRecord(tmp_path),
        callbacks.MetricsLog(tmp_path),
        callbacks.TensorBoardScalars(tmp_path),
    ]
    history = model.fit(
        x, y, epochs=2, batch_size=4, validation_data=(x, y),
        callbacks=parts, verbose=0,
    )  # fmt: skip
    lines = json_lines(tmp_path)
    assert [line["loss"] for line in lines] == history.history["loss"]
    assert capsys.readouterr().out.count("epoch ") == 2
    final = record_of(tmp_path)["final_metrics"]
    assert final["val_loss"] == history.history["val_loss"][-1]
    validation = scalars(tmp_path / "tensorboard" / "validation")
    assert [step for step, _ in validation["loss"]] == [0, 1]
