"""Which tensors are counted, and under which name."""

import keras
import numpy as np
import tensorflow as tf

import tfamp
from tfamp.analysis.probe.histogram import MIN_EXPONENT


def branch():
    inputs = keras.Input((2,))
    outputs = keras.layers.Dense(1, kernel_initializer="ones", name="dense")(
        inputs
    )
    return keras.Model(inputs, outputs, name="branch")


class Twins(keras.Model):
    """Two nested models of one name; the second sees doubled inputs."""

    def __init__(self):
        super().__init__(name="twins")
        self.first = branch()
        self.second = branch()

    def call(self, x):
        return self.first(x) + self.second(2.0 * x)


class Held(keras.Model):
    """Feeds a constant that it holds, and gathers the rows that are asked."""

    def __init__(self):
        super().__init__(name="held")
        self.nodes = tf.constant([[1.0, 2.0], [4.0, 8.0], [0.0, 0.0]])
        self.inner = keras.layers.Identity(name="inner")
        self.dense = keras.layers.Dense(1, name="dense")

    def call(self, index):
        return tf.gather(self.dense(self.inner(self.nodes)), index)


def probed(model, x):
    model(x)
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensors((x, np.ones((len(x), 1), "float32")))
    report = tfamp.probe(model, data, steps=1)
    return {
        (each.layer, each.kind, each.name): each.histogram
        for each in report.tensors
    }


def test_layers_of_one_name_in_nested_models_of_one_name_are_both_counted():
    seen = probed(Twins(), np.array([[1.0, 2.0]], "float32"))
    kinds = {(layer, kind, name) for layer, kind, name in seen}
    for path in ("branch/dense", "branch#2/dense"):
        assert (path, "activation", "") in kinds
        assert (path, "activation_gradient", "") in kinds
        assert (path, "gradient", "kernel") in kinds
    # 1 + 2 is in [2, 4), and 2 + 4 in [4, 8).
    for path, exponent in (("branch/dense", 1), ("branch#2/dense", 2)):
        histogram = seen[path, "activation", ""]
        (found,) = np.flatnonzero(histogram.by_exponent)
        assert found + MIN_EXPONENT == exponent


def test_a_layer_is_kept_in_float32_by_the_path_that_tells_it_apart():
    with tfamp.precision_scope("mixed_float16"):
        model = Twins()
        model(np.ones((1, 2), "float32"))
    tfamp.keep_float32(model, layers="branch#2/dense", outputs=False)
    assert model.first.layers[1].compute_dtype == "float16"
    assert model.second.layers[1].compute_dtype == "float32"


def test_a_constant_that_a_model_holds_is_no_obstacle():
    seen = probed(Held(), np.array([0, 1]))
    constant = seen["inner", "activation", ""]
    assert (constant.measured, constant.zeros) == (4, 2)
    assert seen["dense", "activation", ""].measured > 0
    assert ("dense", "gradient", "kernel") in seen
