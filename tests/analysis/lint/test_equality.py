"""Rounded numbers that are asked for exactly; where findings are."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfamp
from tfamp.analysis.lint.check import lint
from tfamp.precision.keep_float32 import keep_float32
from tfamp.precision.kept_layers import open_door

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
X = np.array([[256.0, 257.0, 258.0, 259.0]], "float32")


@pytest.fixture(autouse=True)
def mixed_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")


class Code(layers.Layer):
    def __init__(self, function):
        super().__init__(name="code")
        self.function = function

    def call(self, x):
        return self.function(x)


CASES = {
    "sentinel": (
        lambda x: ops.where(x == 257.0, ops.zeros_like(x), ops.ones_like(x)),
        [1, 0, 1, 1],
    ),
    "not equal": (
        lambda x: ops.cast(ops.not_equal(x, 257.0), x.dtype),
        [1, 0, 1, 1],
    ),
    "ids": (
        lambda x: ops.cast(
            ops.take(np.arange(512) % 2, ops.cast(x, "int32")), x.dtype
        ),
        [0, 1, 0, 1],
    ),
}


def model_of(layer, shape=(4,)):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(layer(inputs)))
    model.compile(
        tfamp.wrap_optimizer("sgd"), loss="mse", auto_scale_loss=False
    )
    return model


def rules(model, batch=None):
    return [each for each in lint(model, batch) if "equality" in each.rule]


@pytest.mark.parametrize("name", CASES)
def test_what_is_asked_for_exactly_is_an_error_and_kept_it_is_right(name):
    function, expected = CASES[name]
    layer = Code(function)
    model = model_of(layer)
    for batch in (None, (X, np.zeros((1, 1), "float32"))):
        (finding,) = rules(model, batch)
        assert (finding.severity, finding.layer) == ("error", "code")
        path, _, line = finding.line.partition(":")
        assert pathlib.Path(path).resolve() == pathlib.Path(__file__)
        source = pathlib.Path(__file__).read_text().splitlines()
        assert "x" in source[int(line) - 1]
        assert finding.fix == "tfamp.keep_float32(model)"
    # Before, 256, 257 and 258 are one number, or two.
    assert np.asarray(layer(X), "float32").tolist() != [expected]
    keep_float32(model)
    assert np.asarray(layer(X), "float32").tolist() == [expected]
    assert not rules(model)


def test_layers_of_keras_may_cast_to_the_dtype_of_a_tensor():
    # As `Masking` of Keras 3.13 does.
    backend = keras.src.backend
    layer = Code(lambda x: x * backend.cast(ops.not_equal(x, 257.0), x.dtype))
    open_door(layer)
    result = layer(X)
    assert result.dtype == tf.bfloat16
    # 259 is between two numbers of bfloat16.
    assert np.asarray(result, "float32").tolist() == [[256, 0, 258, 260]]


def test_a_masking_layer_looks_for_its_value_before_it_is_rounded(tmp_path):
    layer = layers.Masking(257.0)
    model = model_of(layer, (4, 1))
    assert [each.layer for each in rules(model)] == [layer.name]
    keep_float32(model)
    assert not rules(model)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for each in (layer, loaded.layers[1]):
        result = each(X[..., None])
        assert result.dtype == tf.bfloat16
        assert np.asarray(result._keras_mask).tolist() == [
            [True, False, True, True]
        ]


def test_zero_is_zero_and_the_largest_is_one_of_the_numbers():
    def code(x):
        is_set = ops.cast(ops.not_equal(x, 0.0), x.dtype)
        return is_set * ops.cast(
            x == ops.max(x, axis=-1, keepdims=True), x.dtype
        )

    assert not rules(model_of(Code(code)))


def test_a_dataset_serves_as_its_first_batch():
    data = tf.data.Dataset.from_tensors((X * 1e6, np.zeros((1, 1), "float32")))
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(inputs))
    assert "input-range" in [each.rule for each in lint(model, data)]


def test_what_comes_to_nothing_is_no_finding():
    def code(x):
        ops.softmax(x)
        return x * 2

    assert "hidden-softmax" not in [
        each.rule for each in lint(model_of(Code(code)))
    ]


class SelfTaught(keras.Model):
    """Its layer holds an optimizer, and its step trains with that."""

    def __init__(self):
        super().__init__()
        self.code = Code(lambda x: x)
        self.code.taught_by = keras.optimizers.SGD(0.1)
        self.dense = layers.Dense(1)

    def call(self, x):
        return self.dense(self.code(x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(ops.cast(self(x), "float32") - y))
        variables = self.dense.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        self.code.taught_by.apply(gradients, variables)
        return {"loss": loss}


def test_an_optimizer_that_a_layer_holds_is_found():
    keras.config.set_dtype_policy("mixed_float16")
    model = SelfTaught()
    model(X)
    model.compile(tfamp.wrap_optimizer("adam"), auto_scale_loss=False)
    findings = lint(model, (X, np.zeros((1, 1), "float32")))
    (finding,) = [each for each in findings if each.rule == "no-loss-scaling"]
    assert "SGD does not scale" in finding.message


def test_lint_leaves_no_mark_on_what_it_looked_at():
    model = SelfTaught()
    model(X)
    model.compile(tfamp.wrap_optimizer("adam"), auto_scale_loss=False)
    parts = [model, model.code, model.dense]
    before = [(p.built, p.get_build_config()) for p in parts]
    names = [set(vars(part)) for part in parts]
    lint(model, (X[:, :4].repeat(2, 0), np.zeros((2, 1), "float32")))
    assert [(p.built, p.get_build_config()) for p in parts] == before
    assert [set(vars(part)) for part in parts] == names
