"""Which layers blame tells apart, and what is left of the looking."""

import threading

import keras
import numpy as np
import tensorflow as tf

import tfamp
from tfamp import keras_internals
from tfamp.files.json_lines import read_json_lines
from tfamp.training.callbacks import ScaleTimeline


class Twins(keras.Model):
    """Two nested models of one name, of which the second overflows float16.

    What it is fed is multiplied with a constant that the model holds.
    """

    def __init__(self):
        super().__init__(name="twins")
        self.first = self.branch()
        self.second = self.branch()
        self.gains = keras.layers.Identity(name="gains")
        self.held = tf.constant([[2.0**15, 2.0**15]])

    @staticmethod
    def branch():
        inputs = keras.Input((2,))
        dense = keras.layers.Dense(2, kernel_initializer="ones", name="dense")
        return keras.Model(inputs, dense(inputs), name="branch")

    def call(self, x):
        # Each is finite; their sum, 2**16, is not.
        return self.first(x) + self.second(self.gains(self.held) * x)


def blamed(folder):
    """The model that took one step, and the events of it."""
    with tfamp.precision_scope("mixed_float16"):
        model = Twins()
        x = np.ones((2, 2), "float32")
        model(x)
    optimizer = tfamp.wrap_optimizer(keras.optimizers.SGD(), "mixed_float16")
    model.compile(optimizer, "mse", auto_scale_loss=False)
    data = tf.data.Dataset.from_tensors((x, np.zeros((2, 2), "float32")))
    tfamp.fit(
        model,
        data,
        on_overflow="blame",
        callbacks=[ScaleTimeline(folder)],
        verbose=0,
    )
    return model, read_json_lines(folder / "scale.jsonl")


def test_fits_in_threads_blame_each_their_own_and_leave_nothing(tmp_path):
    done = {}

    def run(name):
        done[name] = blamed(tmp_path / name)

    threads = [threading.Thread(target=run, args=[n]) for n in ("one", "two")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for model, events in (done["one"], done["two"]):
        # Not its namesake, "branch/dense".
        assert [event["layer"] for event in events if event["at_fault"]] == [
            "branch#2/dense"
        ]
        for layer in keras_internals.all_layers(model):
            assert "call" not in vars(layer)
        assert not {"apply", "scale_loss"} & vars(model.optimizer).keys()
