"""The zoo's counts, and its table."""

import keras
import pytest
import tensorflow as tf

from benchmarks import zoo
from tfamp.errors import InputError

MODELS = '''
"""One that squares in its own code, one that fails, and one that hangs."""
import time

import keras
import numpy as np


class Squares(keras.layers.Layer):
    def call(self, x):
        return keras.ops.square(x)


def squares():
    inputs = keras.Input([8])
    x = Squares()(keras.layers.Dense(8)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="scores")(x))
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(2, 3, 8)).astype("float32")
    return model, "mse", (batch[0], batch[1, :, :2])


def fails():
    raise ValueError("a | b")


def hangs():
    time.sleep(1000)


ZOO = {"squares": squares, "fails": fails, "hangs": hangs}
'''


def graph_of(function, *dtypes):
    specs = [tf.TensorSpec([4, 4], dtype) for dtype in dtypes]
    traced = tf.function(function, autograph=False)
    return traced.get_concrete_function(*specs).graph


def test_what_is_sensitive_is_counted_in_16_bits_and_in_called_functions():
    inner = tf.function(tf.math.square, autograph=False)
    counted = zoo.count(
        graph_of(
            lambda a, b: (inner(a), tf.exp(a), tf.exp(b), a + a),
            tf.float16,
            tf.float32,
        )
    )
    assert counted.by_type() == {"Exp": 1, "Square": 1}


def test_products_are_counted_by_dtype_and_pass():
    def step(a, b):
        with tf.GradientTape() as tape:
            tape.watch(b)
            c = tf.matmul(b, b) + tf.cast(tf.matmul(a, a), tf.float32)
        return c, tape.gradient(c, b)

    counted = zoo.count(graph_of(step, tf.bfloat16, tf.float32))
    assert counted.products == {"float32": 3, "bfloat16": 1}
    assert len(counted.float32_products) == 1


def test_plain_sums_of_gradients_stand_apart():
    def step(a):
        bias = tf.ones([4], tf.float16)
        with tf.GradientTape() as tape:
            tape.watch(bias)
            b = a + bias
        return tf.reduce_sum(a), tape.gradient(b, bias)

    # Over the rows along which the bias was repeated.
    counted = zoo.count(graph_of(step, tf.float16))
    assert counted.by_type() == {"Sum": 1}
    assert len(counted.gradient_sums) == 1


def test_what_nothing_comes_of_is_not_counted():
    def step(a):
        with tf.GradientTape() as tape:
            tape.watch(a)
            # Its gradient by beta squares the input, and is not asked for.
            b = tf.nn.silu(a)
        return b, tape.gradient(b, a)

    assert zoo.count(graph_of(step, tf.float16)).by_type() == {}


@pytest.mark.parametrize(
    ("divisor", "left"), [(50.0, {}), (1e-6, {"RealDiv": 1})]
)
def test_a_quotient_by_a_constant_that_16_bits_hold_is_a_product(divisor, left):
    counted = zoo.count(
        graph_of(lambda a: a / tf.constant(divisor, a.dtype), tf.float16)
    )
    assert counted.by_type() == left


@pytest.mark.slow
def test_each_model_has_a_row_those_that_fail_and_hang_too(tmp_path):
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    found = zoo.measure(
        zoo.Config(models=str(path), timeout_seconds=20, preload=("keras",))
    )
    assert "not done after 2" in found["hangs"]
    assert found["fails"] == "ValueError: a / b"
    squares = found["squares"]
    before, after = (squares[when]["counted"] for when in ("before", "after"))
    assert set(before["left"]) == {"Square"}
    assert after["left"] == {}
    assert squares["heads"] == ["scores"]
    assert len(after["float32_products"]) == 1
    assert squares["before"]["finite"]
    assert squares["after"]["finite"]
    assert 0 < squares["after"]["error"] < 0.01


def test_a_row_shows_what_was_found_or_why_nothing_was():
    assert "**OSError: no**" in zoo.row("m", "OSError: no")
    part = {
        "counted": {
            "left": {"Pow": ["a", "b"]},
            "gradient_sums": ["c"],
            "float32_products": [],
        },
        "finite": True,
        "error": float("nan"),
    }
    text = zoo.row("m", {"before": part, "after": part, "heads": []})
    assert text.startswith("| m | Pow 2 | Pow 2 | 1 | 0 and 0 | none | nan |")
    assert text.count("|") == zoo.HEAD[0].count("|") == zoo.HEAD[1].count("|")


@pytest.mark.parametrize(
    "flags", [{}, {"models": "m.py", "precision": "float32"}]
)
def test_what_cannot_be_is_refused(flags):
    with pytest.raises(InputError):
        zoo.Config(**flags)


def test_the_step_is_traced_with_its_gradients():
    inputs = keras.Input([4])
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    model.compile("sgd", "mse")
    batch = (tf.ones([3, 4]), tf.ones([3, 2]))
    loss, gradients = zoo.trace(zoo.plain_step(model), batch)(batch)
    assert loss.shape == []
    assert [g.shape for g in gradients] == [[4, 2], [2]]
