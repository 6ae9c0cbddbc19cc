"""Strategies of one process after each other, with TensorFlow's collectives."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp

X = np.arange(24, dtype="float32").reshape(6, 4) / 24
Y = X[:, :1] * 2 - 1


def trained(num_devices, width, fit):
    """Weights after two epochs of a model of that width."""
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(num_devices)]
    )
    keras.utils.set_random_seed(width)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(width, activation="tanh"),
                keras.layers.Dense(1),
            ]
        )
        model.compile(tfamp.wrap_optimizer(keras.optimizers.SGD(0.1)), "mse")
    fit(model, X, Y, batch_size=6, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fit",
    [tfamp.fit, pytest.param(keras.Model.fit, marks=pytest.mark.slow)],
    ids=["fit", "Model.fit"],
)
def test_strategies_of_one_process_sum_their_own_gradients(fit):
    """A cell that runs again, with another model or other devices."""
    want = {width: trained(1, width, fit) for width in (3, 5)}
    for num_devices, width in [(2, 3), (2, 5), (3, 3)]:
        for ours, alone in zip(
            trained(num_devices, width, fit), want[width], strict=True
        ):
            np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-6)
