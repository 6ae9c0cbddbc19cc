"""What a report says of a run, out of the logs that the run left."""

import json

import pytest

from tfamp.analysis.report import run_logs, run_part
from tfamp.errors import InputError

SPEED = {"examples_per_second": 1000.0, "step_milliseconds": 2.0}


def leave(folder, *, record=None, epochs=(), changes=()):
    if record is not None:
        record = {"schema": "tfamp.run/1", "precision": "float32", **record}
        (folder / "run.json").write_text(json.dumps(record))
    for name, rows in (("metrics", epochs), ("scale", changes)):
        if rows:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines)
    return folder


def epoch(number, loss, **logs):
    return {
        "epoch": number,
        "time": "t",
        "elapsed_seconds": 1.0,
        "loss": loss,
        **SPEED,
        **logs,
    }


def change(step, scale, reason, **fields):
    return {
        "step": step,
        "epoch": 0,
        "scale": scale,
        "reason": reason,
        **fields,
    }


def table(part, caption):
    found = next(t for t in part.tables if t.caption.startswith(caption))
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def test_the_verdict_names_precision_end_metrics_and_skips(tmp_path):
    epochs = [
        epoch(0, 2.0, val_loss=1.5, skipped_steps=2.0),
        epoch(1, 1.0, val_loss=0.5, skipped_steps=1.0),
    ]
    folder = leave(tmp_path, record={"exit_reason": "finished"}, epochs=epochs)
    part = run_part.part(folder)
    assert part.verdict == (
        "float32, 2 epochs, finished. It ended at val_loss 0.5000, loss "
        "1.0000. 3 steps were skipped."
    )
    assert part.is_good


@pytest.mark.parametrize(
    ("reason", "last_loss", "is_good"),
    [
        ("finished", 1.0, True),
        ("finished", None, False),
        ("interrupted", 1.0, None),
        (None, 1.0, None),
        ("20 steps in a row are not finite", 1.0, False),
    ],
)
def test_a_run_is_good_if_it_finished_with_finite_metrics(
    tmp_path, reason, last_loss, is_good
):
    leave(
        tmp_path,
        record={"exit_reason": reason},
        epochs=[epoch(0, 2.0), epoch(1, last_loss)],
    )
    assert run_part.part(tmp_path).is_good is is_good


def test_an_epoch_that_was_done_again_counts_once_and_late(tmp_path):
    losses = [(0, 9.0), (1, 8.0), (2, 7.0), (3, 6.0), (2, 1.0)]
    leave(tmp_path, epochs=[epoch(*each) for each in losses])
    part = run_part.part(tmp_path)
    rows = table(part, "Each epoch")
    # Epoch 4 was lost: the run that went on has not come to it again.
    assert [(row["epoch"], row["loss"]) for row in rows] == [
        ("1", "9.0000"),
        ("2", "8.0000"),
        ("3", "1.0000"),
    ]
    assert part.notes[0].startswith("2 lines of metrics.jsonl are left out")


def test_a_metric_that_was_not_finite_is_said_and_not_drawn(tmp_path):
    leave(tmp_path, epochs=[epoch(0, 1.0), epoch(1, None), epoch(2, 0.5)])
    part = run_part.part(tmp_path)
    assert table(part, "Each epoch")[1]["loss"] == "not finite"
    assert "A metric is not finite in epoch 2." in part.notes


def test_each_metric_is_one_plot_and_the_loss_is_first(tmp_path):
    logs = {"accuracy": 0.5, "val_accuracy": 0.6, "confusion": [[1, 2]]}
    leave(tmp_path, epochs=[epoch(0, 1.0, **logs), epoch(1, 0.5, **logs)])
    captions = [plot.caption for plot in run_part.part(tmp_path).plots]
    assert captions[0] == "loss by epoch, in training."
    assert captions[1] == "accuracy by epoch, in evaluation and training."
    assert len(captions) == 3  # And the throughput.


def test_the_learning_rate_is_drawn_and_is_no_metric(tmp_path):
    epochs = [
        epoch(0, 1.0, learning_rate=0.1),
        epoch(1, 0.5, learning_rate=0.01),
    ]
    leave(tmp_path, epochs=epochs)
    part = run_part.part(tmp_path)
    assert "learning" not in part.verdict
    assert table(part, "Each epoch")[1]["learning rate"] == "0.01"
    plot = next(p for p in part.plots if "learning rate" in p.caption)
    assert plot.values["panels"][0]["series"][0]["y"] == [0.1, 0.01]


def test_the_timeline_is_that_of_the_last_run_and_what_it_took_up(tmp_path):
    leave(
        tmp_path,
        changes=[
            change(0, 8.0, "start"),
            change(5, 4.0, "overflow"),
            change(0, 64.0, "start"),
            change(3, 32.0, "overflow"),
            change(6, 64.0, "growth"),
            change(9, 16.0, "overflow"),
            change(6, 32.0, "resumed"),
            change(7, 16.0, "overflow"),
        ],
    )
    changes = run_logs.read(tmp_path).changes
    assert [(c["step"], c["scale"]) for c in changes] == [
        (0, 64.0),
        (3, 32.0),
        (6, 64.0),
        (6, 32.0),
        (7, 16.0),
    ]
    part = run_part.part(tmp_path)
    assert "2 steps were skipped." in part.verdict
    assert [row["step"] for row in table(part, "Skipped")] == ["3", "7"]


def test_each_optimizer_has_a_timeline_of_its_own(tmp_path):
    leave(
        tmp_path,
        changes=[
            change(0, 8.0, "start", optimizer="critic"),
            change(0, 64.0, "start", optimizer="generator"),
            change(9, 4.0, "overflow", optimizer="critic"),
            change(4, 64.0, "resumed", optimizer="generator"),
            change(4, 32.0, "overflow", optimizer="generator"),
        ],
    )
    part = run_part.part(tmp_path)
    rows = table(part, "Skipped")
    assert [(row["step"], row["optimizer"]) for row in rows] == [
        ("4", "generator"),
        ("9", "critic"),
    ]
    timeline = part.plots[0]
    assert ">critic<" in timeline.svg
    assert ">generator<" in timeline.svg
    assert "2 skipped steps" in timeline.alternative


def test_the_verdict_quotes_what_something_else_than_the_scale_did(tmp_path):
    message = "The data are at fault: the inputs hold inf or NaN."
    blamed = {"at_fault": "data", "message": message, "replica": 1}
    harmless = {"at_fault": "scale", "message": "Only the scaling."}
    leave(
        tmp_path,
        record={"exit_reason": "finished"},
        changes=[
            change(0, 8.0, "start"),
            change(1, 4.0, "overflow", **harmless),
            change(2, 2.0, "overflow", **blamed),
        ],
    )
    part = run_part.part(tmp_path)
    assert part.verdict.endswith(f"2 steps were skipped. Step 2: {message}")
    assert part.is_good is False
    row = table(part, "Skipped")[1]
    assert (row["at fault"], row["replica"]) == ("data", "1")
    assert row["epoch"] == "1"


def test_a_scale_that_never_moved_is_drawn_by_epoch(tmp_path):
    leave(
        tmp_path,
        epochs=[epoch(0, 1.0, loss_scale=65536.0, skipped_steps=0.0)],
        changes=[change(0, 65536.0, "start")],
    )
    part = run_part.part(tmp_path)
    assert part.plots[1].caption.startswith("The loss scale at the end of")
    assert "ends at 2^16" in part.plots[1].alternative
    assert [table.caption for table in part.tables] == ["Each epoch"]
    assert "No step was skipped." in part.verdict


def test_a_line_that_was_never_finished_is_left_out(tmp_path):
    leave(tmp_path, epochs=[epoch(0, 1.0)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 1, "lo')
    assert len(run_logs.read(tmp_path).epochs) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{", "cannot be read"),
        ("run.json", '{"schema": "x/1"}', "schema 'x/1'"),
        ("metrics.jsonl", "nonsense\n", "not a log of JSON lines"),
        ("metrics.jsonl", '{"loss": 1}\n', "no 'epoch' in line 1"),
        ("scale.jsonl", '{"step": 1, "scale": 2}\n', "no 'reason' in line 1"),
    ],
)
def test_a_log_that_is_none_is_turned_down(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        run_part.part(tmp_path)
