"""The loss of each step, as seen from outside of any recipe."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tfamp.analysis.parity.step_losses import StepLosses
from tfamp.training.observers import Observer, observing

# With weight 0 and rate 0 the loss of a batch is the mean of its y squared.
TARGETS = np.array([[1.0], [1.0], [3.0], [3.0], [5.0]], "float32")


def batches(targets=TARGETS):
    data = tf.data.Dataset.from_tensor_slices((np.ones_like(targets), targets))
    return data.batch(2)


def linear_model(model_class=keras.Model, rate=0.0):
    inputs = keras.Input([1])
    outputs = keras.layers.Dense(1, kernel_initializer="zeros")(inputs)
    model = model_class(inputs, outputs)
    model.compile(keras.optimizers.SGD(rate), "mse")
    return model


def losses(model, data, **options):
    recorder = StepLosses()
    with observing(Observer([recorder])):
        tfamp.fit(model, data, verbose=0, **options)
    return recorder.losses


def test_each_step_has_the_loss_of_its_own_batch():
    found = losses(linear_model(), batches(), epochs=2)
    once = [1.0, 9.0, 25.0]
    assert found == dict(enumerate(once + once, start=1))


def test_watching_changes_no_loss():
    model, unwatched = linear_model(rate=0.1), linear_model(rate=0.1)
    losses(model, batches(), epochs=2)
    history = tfamp.fit(unwatched, batches(), epochs=2, verbose=0)
    assert model.history.history["loss"] == history.history["loss"]
    np.testing.assert_array_equal(
        model.get_weights()[0], unwatched.get_weights()[0]
    )


def test_replicas_add_up_to_the_loss_of_the_global_batch(mirrored):
    with mirrored(2).scope():
        model = linear_model()
    found = losses(model, batches())
    assert found == {1: 1.0, 2: 9.0, 3: 25.0}


def test_a_call_of_several_steps_has_their_mean_under_the_last():
    found = losses(linear_model(), batches(), steps_per_loop=2)
    assert found == {2: (1.0 + 9.0) / 2, 3: 25.0}


def test_a_loss_that_is_not_finite_is_none():
    targets = TARGETS.copy()
    targets[2] = np.inf
    found = losses(linear_model(), batches(targets))
    assert found == {1: 1.0, 2: None, 3: 25.0}


@pytest.mark.slow
def test_steps_go_on_where_a_recipe_calls_fit_twice():
    model, recorder = linear_model(), StepLosses()
    with observing(Observer([recorder])):
        tfamp.fit(model, batches(), verbose=0)
        tfamp.fit(model, batches(), verbose=0)
    assert list(recorder.losses) == [1, 2, 3, 4, 5, 6]


class OwnMean(keras.Model):
    """Keeps a mean of its own beside Keras's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mean = keras.metrics.Mean(name="generator_loss")

    def train_step(self, data):
        self.mean.update_state(tf.reduce_mean(data[1] ** 2))
        return {"generator_loss": self.mean.result()}


class OwnLog(keras.Model):
    """Returns a loss that no metric holds."""

    def train_step(self, data):
        return {"other": 0.0, "loss": tf.reduce_mean(data[1] ** 2)}


@pytest.mark.parametrize("model_class", [OwnMean, OwnLog])
def test_a_train_step_of_its_own_tells_by_what_it_logs(model_class):
    found = losses(linear_model(model_class), batches(), epochs=2)
    assert list(found.values()) == [1.0, 9.0, 25.0] * 2


def test_the_loss_scale_is_kept_where_it_changes():
    model = linear_model()
    model.optimizer = tfamp.LossScaleOptimizer(
        keras.optimizers.SGD(0.0), initial_scale=8.0, dynamic_growth_steps=2
    )
    recorder = StepLosses()
    with observing(Observer([recorder])):
        tfamp.fit(model, batches(), epochs=2, verbose=0)
    assert recorder.scale_changes == [(1, 8.0), (2, 16.0), (4, 32.0), (6, 64.0)]
