"""What an evaluation returns, and what it does not make up."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_slow


class Rooted(keras.Model):
    """Its `test_step` knows the root of the mean square, and no metric."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(
            1, use_bias=False, kernel_initializer="ones"
        )

    def call(self, x):
        return self.dense(x)

    def test_step(self, data):
        x, y = data
        error = keras.ops.mean(keras.ops.square(self(x) - y))
        return {"mean_square": error, "rows": keras.ops.shape(x)[0]}


def rooted(strategy):
    with strategy.scope():
        model = Rooted()
        model(np.ones((1, 1), "float32"))
        model.compile("sgd", "mse", metrics=["mae"])
    x = np.array([[1.0], [3.0], [5.0]], "float32")
    # One batch of 3 rows: of 2 replicas one has 2 of them.
    data = tf.data.Dataset.from_tensor_slices((x, np.zeros((3, 1), "f")))
    return model, data.batch(3)


@pytest.mark.parametrize("replicas", mostly_slow([1, 2], always=[2]))
def test_an_own_test_steps_results_are_kept_and_no_others(mirrored, replicas):
    model, data = rooted(mirrored(replicas))
    results = tfamp.evaluate(model, data)
    assert results.keys() == {"mean_square", "rows"}
    # (1 + 9 + 25) / 3, whatever the shares.
    assert results["mean_square"] == pytest.approx(35 / 3)
    history = tfamp.fit(model, data, validation_data=data, verbose=0).history
    validated = {name for name in history if name.startswith("val_")}
    assert validated == {"val_mean_square", "val_rows"}


def test_metrics_of_an_epoch_in_which_no_step_counted_are_not_numbers():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae", "mse"])
    x = np.full((4, 1), np.nan, "float32")
    data = tf.data.Dataset.from_tensor_slices((x, x)).batch(2)
    history = tfamp.fit(model, data, epochs=2, verbose=0).history
    for name in ("loss", "mae", "mse"):
        assert np.isnan(history[name]).all(), name
    assert history["skipped_steps"] == [2, 2]
