"""Every fit inside the context has the observer, and none after it."""

import keras
import pytest
import tensorflow as tf

import tfamp
from tfamp.training.observers import Observer, observing


class Counter(keras.callbacks.Callback):
    """Counts batches."""

    def __init__(self):
        super().__init__()
        self.batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    return model


@pytest.fixture
def batches():
    rows = tf.ones([8, 2]), tf.ones([8, 1])
    return tf.data.Dataset.from_tensor_slices(rows).batch(2)


def test_an_observer_sees_every_batch_and_only_inside(model, batches):
    counter = Counter()
    with observing(Observer([counter])):
        tfamp.fit(model, batches, verbose=0)
        tfamp.fit(model, batches, verbose=0)
    tfamp.fit(model, batches, verbose=0)
    assert counter.batches == 8


def test_an_observer_may_change_the_data(model, batches):
    counter = Counter()
    with observing(Observer([counter], lambda data: data.take(1))):
        tfamp.fit(model, batches, verbose=0)
    assert counter.batches == 1


def test_the_context_ends_with_an_exception(model, batches):
    counter = Counter()
    with pytest.raises(KeyError), observing(Observer([counter])):
        raise KeyError
    tfamp.fit(model, batches, verbose=0)
    assert counter.batches == 0
