"""Optimizers that are more than one, or more than weights and moments."""

import keras
import numpy as np
import pytest

import tfamp

X = np.linspace(-1, 1, 32, dtype="float32").reshape(8, 4)
Y = X[:, :1] * 2


def build_model(optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input([4]),
            keras.layers.Dense(2, name="a"),
            keras.layers.Dense(1, name="b"),
        ]
    )
    model.compile(optimizer, "mse")
    return model


@pytest.mark.parametrize(
    ("callback", "rates"),
    [
        (
            lambda: keras.callbacks.LearningRateScheduler(lambda e, r: r / 2),
            (0.125, 0.25),
        ),
        (
            lambda: keras.callbacks.ReduceLROnPlateau(
                monitor="loss", patience=1, min_delta=10, factor=0.5
            ),
            (0.25, 0.5),
        ),
    ],
)
def test_callbacks_set_the_learning_rate_of_each_optimizer(callback, rates):
    optimizers = keras.optimizers.OptimizerMap(
        default_optimizer=keras.optimizers.SGD(0.5, name="one")
    )
    optimizers["b/.*"] = keras.optimizers.SGD(1.0, name="other")
    model = build_model(keras.optimizers.MultiOptimizer(optimizers))
    history = tfamp.fit(
        model, X, Y, epochs=2, callbacks=[callback()], verbose=0
    )
    ends = [
        float(each.learning_rate.numpy()) for each in model.optimizer.optimizers
    ]
    assert sorted(ends) == list(rates)
    assert {"learning_rate_one", "learning_rate_other"} <= set(history.history)


def test_schedule_free_adamw_begins_at_the_weights_with_stock_fit_too():
    histories = []
    for fit in (keras.Model.fit, tfamp.fit):
        optimizer = keras.optimizers.ScheduleFreeAdamW(0.05)
        model = build_model(tfamp.wrap_optimizer(optimizer))
        options = {"epochs": 2, "batch_size": 4, "shuffle": False, "verbose": 0}
        histories.append(fit(model, X, Y, **options).history["loss"])
    np.testing.assert_allclose(*histories, rtol=1e-5)


def test_an_optimizer_that_is_one_has_no_parts():
    assert not hasattr(tfamp.wrap_optimizer("sgd"), "optimizers")
