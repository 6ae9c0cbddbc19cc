"""A step that does not count leaves state as it was, through every door."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import first_always


class Root(keras.layers.Layer):
    """Counts its training steps; finite at 0, where its gradient is not."""

    def build(self, shape):
        self.count = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="count"
        )

    def call(self, x, training=None):
        if training:
            self.count.assign_add(1.0)
        return keras.ops.sqrt(x)


class Own(keras.Model):
    """Its step takes gradients by tfamp, or by a tape of its own."""

    by_hand = False

    def train_step(self, data):
        x, _ = data
        weights = self.trainable_variables
        if self.by_hand:
            with tf.GradientTape() as tape:
                loss = self._loss_of(x)
                scaled = self.optimizer.scale_loss(loss)
            gradients = tape.gradient(scaled, [w.value for w in weights])
        else:
            loss, gradients = tfamp.value_and_gradients(
                lambda: self._loss_of(x), weights, self.optimizer
            )
        self.optimizer.apply(gradients, weights)
        self.mean.update_state(loss)
        return {"mean": self.mean.result()}

    def _loss_of(self, x):
        return keras.ops.mean(self(x, training=True))


def build(cls=keras.Model, **options):
    inputs = keras.Input([1])
    hidden = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")(
        inputs
    )
    model = cls(inputs, Root(name="root")(hidden))
    if cls is Own:
        model.mean = keras.metrics.Mean(name="mean")
    model.compile(
        tfamp.wrap_optimizer(keras.optimizers.SGD(0.0)),
        loss="mae",
        **options,
    )
    return model


def data(last):
    """A batch whose outputs are 2, and are to be -1; and another."""
    x = np.array([[4.0]] * 4 + [[last]] * 4, "float32")
    return tf.data.Dataset.from_tensor_slices((x, -np.ones_like(x))).batch(4)


def count(model):
    return float(model.get_layer("root").count.numpy())


@pytest.mark.parametrize("last", first_always([0.0, np.nan], 1))
@pytest.mark.parametrize(("replicas", "microbatches"), [(1, 1), (1, 2), (2, 1)])
def test_fit_counts_nothing_of_a_step_that_it_skips(
    last, replicas, microbatches, mirrored
):
    with mirrored(replicas).scope():
        model = build(metrics=["mae"])

    history = tfamp.fit(
        model, data(last), microbatches=microbatches, verbose=0
    ).history

    assert history["skipped_steps"] == [1]
    assert (history["loss"], history["mae"]) == ([3.0], [3.0])
    assert count(model) == 1.0 * microbatches


@pytest.mark.parametrize("by_hand", [False, True])
def test_fit_puts_back_what_an_own_step_moved(by_hand):
    model = build(Own)
    model.by_hand = by_hand

    history = tfamp.fit(model, data(0.0), verbose=0).history

    assert (history["skipped_steps"], history["mean"]) == ([1], [2.0])
    assert count(model) == 1.0


@pytest.mark.parametrize("replicas", [1, 2])
def test_fit_of_keras_puts_back_statistics_and_the_loss(replicas, mirrored):
    with mirrored(replicas).scope():
        model = build()

    history = model.fit(data(np.nan), verbose=0, shuffle=False).history

    assert history["loss"] == [3.0]
    assert count(model) == 1.0


def test_fit_of_keras_leaves_no_nan_in_the_averages_of_a_batch_norm():
    model = keras.Sequential(
        [keras.Input([1]), keras.layers.BatchNormalization(momentum=0.5)]
    )
    model.compile(tfamp.wrap_optimizer(keras.optimizers.SGD(0.0)), "mse")

    model.fit(data(np.nan), verbose=0, shuffle=False)

    # Half of the mean of the first batch, which is 4.
    np.testing.assert_array_equal(model.layers[0].moving_mean, [2.0])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "traced"])
def test_a_hand_written_loop_puts_back_what_its_loss_moved(compiled):
    model = build()
    weights = model.trainable_variables
    model.optimizer.build(weights)

    def step(x):
        _, gradients = tfamp.value_and_gradients(
            lambda: keras.ops.mean(model(x, training=True)),
            weights,
            model.optimizer,
        )
        model.optimizer.apply(gradients, weights)

    step = tf.function(step) if compiled else step
    for x, _ in data(0.0):
        step(x)

    assert int(model.optimizer.skipped_steps.numpy()) == 1
    assert count(model) == 1.0


def test_another_optimizer_in_the_graph_keeps_its_count():
    models = build(), build()
    for model in models:
        model.optimizer.build(model.trainable_variables)

    @tf.function
    def step(*batches):
        for model, x in zip(models, batches, strict=True):
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(model(x, training=True))
            weights = [w.value for w in model.trainable_variables]
            model.optimizer.apply(tape.gradient(loss, weights))

    step(tf.zeros([1, 1]), tf.ones([1, 1]))
    step(tf.ones([1, 1]), tf.zeros([1, 1]))

    for model in models:
        assert count(model) == 1.0
        assert int(model.optimizer.skipped_steps.numpy()) == 1
        assert int(model.optimizer.iterations.numpy()) == 1
