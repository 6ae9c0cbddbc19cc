"""A model with its own `train_step`, as tfamp.fit trains it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from packaging.version import Version

import tfamp


class Own(keras.Model):
    """Scales its loss by whatever optimizer it has."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            outputs = keras.ops.cast(self(x, training=True), "float32")
            loss = keras.ops.mean(keras.ops.square(outputs - y))
            scaled = self.optimizer.scale_loss(loss)
        weights = self.trainable_weights
        gradients = tape.gradient(scaled, [w.value for w in weights])
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return {"loss": loss}


@pytest.mark.parametrize("replica", [0, 1])
def test_overflow_on_any_replica_is_skipped_though_keras_wrapped_it(
    mirrored, replica
):
    with tfamp.precision_scope("mixed_float16"), mirrored(2).scope():
        inputs = keras.Input((1,))
        outputs = keras.layers.Dense(1, kernel_initializer="ones")(inputs)
        model = Own(inputs, outputs)
        # Keras wraps it into a scaler that looks at the first replica only.
        model.compile(keras.optimizers.SGD(1e-3))
    assert not isinstance(model.optimizer, tfamp.LossScaleOptimizer)
    x = np.full((4, 1), 1e-3, "float32")
    x[2 * replica] = 6e4
    data = tf.data.Dataset.from_tensor_slices((x, np.zeros((4, 1), "f")))
    before = model.get_weights()
    # What overflows is the head, which fit would keep in float32.
    tfamp.fit(model, data.batch(4), keep_float32=False, verbose=0)
    assert isinstance(model.optimizer, tfamp.LossScaleOptimizer)
    assert int(model.optimizer.skipped_steps.numpy()) == 1
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


class SelfTaught(keras.layers.Layer):
    """A layer that trains itself."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")
        self.own = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(1e-3)
        )

    def call(self, x):
        return self.dense(x)

    def learn(self, x):
        weights = self.dense.trainable_variables
        with tf.GradientTape() as tape:
            loss = self.own.scale_loss(keras.ops.mean(self(x)))
        gradients = tape.gradient(loss, [w.value for w in weights])
        self.own.apply(gradients, weights)


class OfSelfTaught(keras.Model):
    def __init__(self):
        super().__init__()
        self.layer = SelfTaught()

    def call(self, x):
        return self.layer(x)

    def train_step(self, data):
        self.layer.learn(data[0])
        return {}


def test_the_scaler_of_a_layer_is_made_safe_and_its_skips_are_counted():
    model = OfSelfTaught()
    model(np.ones((1, 1), "float32"))
    model.layer.own.build(model.layer.dense.trainable_variables)
    model.compile(optimizer=None)
    x = np.full((2, 1), np.inf, "float32")
    history = tfamp.fit(model, x, x, verbose=0).history
    assert isinstance(model.layer.own, tfamp.LossScaleOptimizer)
    assert history["skipped_steps"] == [1]
    assert np.isfinite(model.get_weights()[0]).all()


class TwoNumbers(keras.metrics.Metric):
    """Counts calls; its result is a dict."""

    def __init__(self):
        super().__init__(name="numbers")
        self.calls = self.add_variable((), "zeros", name="calls")

    def update_state(self, y, outputs, sample_weight=None):
        self.calls.assign_add(1.0)

    def result(self):
        return {"one": self.calls + 0.0, "two": self.calls * 2}


class AsInTheGuides(keras.Model):
    """Returns all metrics by name, those of `compile` in one dict."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x))
        weights = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return self.numbers(loss, y, x) | {"rows": tf.constant([1.0, 3.0])}

    def test_step(self, data):
        x, y = data
        loss = self.compute_loss(y=y, y_pred=self(x), training=False)
        return self.numbers(loss, y, x)

    def numbers(self, loss, y, x):
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, self(x))
        return {metric.name: metric.result() for metric in self.metrics}


@pytest.mark.skipif(
    Version(keras.__version__) < Version("3.15"),
    reason="seen in 3.10 and 3.13: its mae of training is that of validation",
)
def test_logs_in_dicts_and_arrays_are_those_of_model_fit():
    x = np.linspace(0, 1, 8, dtype="float32")[:, None]

    def histories(fit):
        for make in (
            AsInTheGuides,
            lambda: keras.Sequential([AsInTheGuides().dense]),
        ):
            keras.utils.set_random_seed(0)
            model = make()
            model.compile("sgd", "mse", metrics=["mae", TwoNumbers()])
            yield fit(
                model,
                x,
                2 * x,
                batch_size=4,
                validation_data=(x, x),
                verbose=0,
            ).history

    for ours, stock in zip(
        histories(tfamp.fit), histories(keras.Model.fit), strict=True
    ):
        assert {"mae", "one", "two", "val_one"} <= set(stock) <= set(ours)
        for name, values in stock.items():
            np.testing.assert_allclose(ours[name], values, rtol=1e-6)
