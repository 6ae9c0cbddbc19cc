"""Trackers of others, where their packages are installed."""

import glob

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp

X = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
Y = X[:, :1]
# What they import warns as it likes.
pytestmark = pytest.mark.filterwarnings("ignore")


def fit(**options):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    options = {"epochs": 2, "batch_size": 8, "verbose": 0} | options
    return tfamp.fit(model, X, Y, validation_data=(X, Y), **options).history


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("mlflow.keras")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'runs'}")
    yield mlflow
    mlflow.keras.autolog(disable=True)


def metrics_of(mlflow, run_id):
    client = mlflow.MlflowClient()
    return {
        name: [each.value for each in client.get_metric_history(run_id, name)]
        for name in mlflow.get_run(run_id).data.metrics
    }


def assert_logged(logged, history):
    for name in ("loss", "val_mae", "loss_scale", "skipped_steps"):
        np.testing.assert_allclose(logged[name], history[name], rtol=1e-6)


def test_autologging_of_mlflow_sees_what_fit_does(mlflow):
    mlflow.keras.autolog(log_models=False, log_datasets=False)
    history = fit()
    assert mlflow.active_run() is None
    run = mlflow.last_active_run()
    assert run.info.status == "FINISHED"
    mlflow.flush_async_logging()
    assert_logged(metrics_of(mlflow, run.info.run_id), history)
    with mlflow.start_run() as own:
        fit(epochs=1)
        assert mlflow.active_run().info.run_id == own.info.run_id
    mlflow.flush_async_logging()
    assert "loss" in metrics_of(mlflow, own.info.run_id)


def test_a_fit_that_fails_ends_the_run_of_autologging(mlflow):
    mlflow.keras.autolog(log_models=False, log_datasets=False)
    fails = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        fit(callbacks=[fails])
    assert mlflow.active_run() is None
    assert mlflow.last_active_run().info.status == "FAILED"


def test_the_callback_of_mlflow_logs_once(mlflow):
    with mlflow.start_run() as run:
        history = fit(callbacks=[mlflow.keras.MlflowCallback()])
    mlflow.flush_async_logging()
    assert_logged(metrics_of(mlflow, run.info.run_id), history)


def test_weights_and_biases_logs_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb = pytest.importorskip("wandb")
    keras_of_wandb = pytest.importorskip("wandb.integration.keras")
    run = wandb.init(project="test", dir=str(tmp_path))
    history = fit(callbacks=[keras_of_wandb.WandbMetricsLogger()])
    summary = dict(run.summary)
    run.finish()
    for name in ("loss", "val_mae", "loss_scale"):
        value = summary[f"epoch/{name}"]
        np.testing.assert_allclose(value, history[name][-1], rtol=1e-6)


def test_tensorboard_gets_scalars_and_histograms(tmp_path):
    pytest.importorskip("tensorboard")
    board = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1)
    history = fit(callbacks=[board])
    logged = {}
    for side in ("train", "validation"):
        for path in glob.glob(f"{tmp_path}/{side}/events*"):
            for record in tf.data.TFRecordDataset(path):
                event = tf.compat.v1.Event.FromString(record.numpy())
                for each in event.summary.value:
                    value = tf.make_ndarray(each.tensor)
                    logged.setdefault((side, each.tag), []).append(value)
    for side, tag, name in (
        ("train", "epoch_loss", "loss"),
        ("train", "epoch_loss_scale", "loss_scale"),
        ("validation", "epoch_mae", "val_mae"),
    ):
        np.testing.assert_allclose(logged[side, tag], history[name], rtol=1e-6)
    assert ("train", "sequential/dense/kernel/histogram") in logged or any(
        "kernel" in tag for _, tag in logged
    )
