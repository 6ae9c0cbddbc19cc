"""What a step does otherwise on GPUs: the same numbers, and fewer branches."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long
from tfamp.scaling import optimizer
from tfamp.step import build
from tfamp.training import fit


def _own(y_true, y_pred):
    return keras.ops.abs(y_true - y_pred)


def trained(strategy, monkeypatch, on_gpus, metrics):
    """Of three batches one is not finite; its metrics must not count."""
    for module in (build, optimizer):
        monkeypatch.setattr(module, "computes_on_gpus", lambda _: on_gpus)
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).standard_normal((12, 3)).astype("float32")
    y = x[:, :1].copy()
    x[5] = np.inf
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        schedule = keras.optimizers.schedules.CosineDecay(
            0.1, 10, warmup_target=0.2, warmup_steps=2
        )
        model.compile(keras.optimizers.Adam(schedule), "mse", metrics=metrics)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    graphs = []
    monkeypatch.setattr(
        tf,
        "cond",
        lambda *a, cond=tf.cond, **k: graphs.append(a) or cond(*a, **k),
    )
    history = tfamp.fit(model, data, shuffle=False, verbose=0)
    monkeypatch.undo()
    logs = {
        name: history.history[name]
        for name in ("loss", "mae", "skipped_steps")
        if name in history.history
    }
    return model.get_weights(), logs, len(graphs)


@pytest.mark.parametrize("replicas", mostly_long((1, 2), always=[1]))
def test_metrics_and_schedules_are_the_same_without_a_branch(
    replicas, mirrored, monkeypatch
):
    on_host = trained(mirrored(replicas), monkeypatch, False, ["mae"])
    on_gpus = trained(mirrored(replicas), monkeypatch, True, ["mae"])

    assert on_host[1] == on_gpus[1]
    assert on_gpus[1]["skipped_steps"] == [1]
    assert np.isfinite(on_gpus[1]["mae"]).all()
    for mine, other in zip(on_gpus[0], on_host[0], strict=True):
        np.testing.assert_array_equal(mine, other)
    assert on_gpus[2] < on_host[2]


def test_metrics_of_others_never_see_what_is_no_number(mirrored, monkeypatch):
    _, _, branches = trained(mirrored(1), monkeypatch, True, [_own])
    _, _, on_host = trained(mirrored(1), monkeypatch, False, [_own])
    assert branches == on_host


@pytest.mark.parametrize(
    ("on_gpus", "on_overflow", "with_timeline", "is_kept"),
    [
        (True, "ignore", False, False),
        (True, "ignore", True, True),
        (True, "log", False, True),
        (False, "ignore", False, True),
    ],
)
def test_no_step_is_looked_at_on_gpus_where_nobody_is_told(
    on_gpus, on_overflow, with_timeline, is_kept, monkeypatch, tmp_path
):
    monkeypatch.setattr(fit, "computes_on_gpus", lambda _: on_gpus)
    made = []
    monkeypatch.setattr(
        fit,
        "KeptStep",
        lambda *a, cls=fit.KeptStep: made.append(a) or cls(*a),
    )
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.array([[1.0], [np.inf], [1.0]], "float32")
    seen = []
    timeline = tfamp.callbacks.ScaleTimeline(tmp_path)
    timeline.on_scale_event = seen.append
    history = tfamp.fit(
        model,
        x,
        np.ones((3, 1)),
        batch_size=1,
        shuffle=False,
        verbose=0,
        on_overflow=on_overflow,
        callbacks=[timeline] if with_timeline else [],
    )

    assert bool(made) == is_kept
    # What was skipped is counted all the same.
    assert history.history["skipped_steps"] == [1]
    assert np.isfinite(model.get_weights()[0]).all()
    assert [each.reason for each in seen if each.reason == "overflow"] == (
        ["overflow"] if with_timeline else []
    )
