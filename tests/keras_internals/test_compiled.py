"""What `compile` was told is found, and what it left on the model."""

import keras
import numpy as np
import pytest
from keras import layers

from tests.keras_internals.trainees import compiled_model
from tfamp import keras_internals


def test_compile_arguments_are_the_callers_own_objects():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    loss = keras.losses.MeanSquaredError()
    model.compile("sgd", loss=loss, metrics=["mae"], weighted_metrics=["mse"])
    arguments = keras_internals.compile_arguments(model)
    assert arguments["loss"] is loss
    assert arguments["optimizer"] is model.optimizer
    assert arguments["metrics"] == ["mae"]
    assert arguments["weighted_metrics"] == ["mse"]


@pytest.mark.parametrize(
    ("told", "expected"),
    [("auto", None), (True, True), (False, None)],
)
def test_what_compile_was_told_of_xla_is_found(told, expected):
    """On a CPU "auto" becomes False: told the same, it is as if not told."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=told)
    assert keras_internals.asked_to_jit(model) is expected


def test_another_optimizer_is_saved_with_the_model(tmp_path):
    model = compiled_model()
    model.build((None, 3))
    keras_internals.replace_optimizer(model, keras.optimizers.Lion(0.25))
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, keras.optimizers.Lion)


def test_metrics_of_others_are_told_from_keras_s_own():
    def own(y_true, y_pred):
        return y_pred - y_true

    class Own(keras.metrics.MeanSquaredError):
        pass

    for metrics, expected in (
        ([], True),
        (["mae", keras.metrics.AUC()], True),
        ([own], False),
        ([Own()], False),
    ):
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
        model.compile("sgd", "mse", metrics=metrics, run_eagerly=True)
        ones = np.ones((2, 1), "float32")
        model.train_on_batch(ones, ones)
        assert keras_internals.metrics_are_kerass(model) == expected


def test_metrics_count_as_compute_metrics_has_them_count():
    def compiled():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        model.compile(
            loss="mse", metrics=["mae"], weighted_metrics=["cosine_similarity"]
        )
        return model

    generator = np.random.default_rng(0)
    y, outputs = generator.random((2, 6, 2), "float32")
    weights = generator.random(6, "float32")
    model, other = compiled(), compiled()
    expected = model.compute_metrics(None, y, outputs, weights)
    keras_internals.count_in_metrics(other, y, outputs, weights)
    assert {"mae", "cosine_similarity"} < expected.keys()
    for name, value in other.get_metrics_result().items():
        assert float(value) == float(expected[name]), name


def test_loss_and_metrics_used_on_trial_stay_unbuilt():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2)])
    model.compile("sgd", loss="mse", metrics=["mae"])
    y = np.ones((1, 2), "float32")
    before = [metric.name for metric in model.metrics]
    with keras_internals.loss_and_metrics_unbuilt(model):
        assert float(model.compute_loss(None, y, y)) == 0.0
        model.compute_metrics(None, y, y)
    assert not model._compile_loss.built
    assert not model._compile_metrics.built
    assert [metric.name for metric in model.metrics] == before
