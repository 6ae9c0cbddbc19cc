"""Faults of twelve kinds, each planted alone, and the same mended."""

import functools
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfamp
from tests.conftest import mostly_long
from tfamp.analysis.shadow.compare import compare

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy"
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast"),
]


class Code(layers.Layer):
    """Code of somebody's own."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def wide(x):
    return ops.cast(x, "float32")


@tf.custom_gradient
def gradient_that_overflows(x):
    def gradient(upstream):
        # 300 * 300, and back by as much.
        return upstream * tf.square(x) / 90_000

    return tf.identity(x), gradient


@tf.custom_gradient
def gradient_in_float32(x):
    def gradient(upstream):
        square = tf.square(tf.cast(x, "float32"))
        return tf.cast(tf.cast(upstream, "float32") * square / 90_000, x.dtype)

    return tf.identity(x), gradient


def count(x):
    total = ops.while_loop(
        lambda i, total: i < 600,
        lambda i, total: (i + 1, total + x[:, :1]),
        (0, x[:, :1] * 0),
    )[1]
    return x + total / 600


# By kind: the fault, the same mended, what x holds (everywhere, or row by
# row), the dtype, and the operations one of which is to be named.
FAULTS = {
    "range": (
        lambda x: ops.sqrt(ops.square(x)),
        lambda x: ops.cast(ops.sqrt(ops.square(wide(x))), x.dtype),
        300.0,
        "float16",
        {"Square"},
    ),
    "resolution": (
        lambda x: ops.floor(x * 8) - ops.floor(x) * 8,
        lambda x: ops.cast(ops.floor(wide(x) * 8) % 8, x.dtype),
        [100.13, 101.26, 102.38, 103.51],
        "bfloat16",
        {"Sub"},
    ),
    "cancellation": (
        lambda x: (x + 1000.0) - 1000.0,
        lambda x: ops.cast((wide(x) + 1000.0) - 1000.0, x.dtype),
        [0.5, 1.5, 2.5, 3.25],
        "bfloat16",
        {"Sub"},
    ),
    "accumulation": (
        lambda x: functools.reduce(lambda y, _: y + x, range(300), x * 256),
        lambda x: x * 556,
        1.0,
        "bfloat16",
        {"AddV2"},
    ),
    "equality": (
        lambda x: ops.where(ops.equal(x, 257.0), x, x * 0),
        lambda x: ops.where(ops.equal(wide(x), 257.0), x, x * 0),
        [256.0, 257.0, 258.0, 259.0],
        "bfloat16",
        {"Equal"},
    ),
    "index": (
        lambda x: (
            x * 0
            + ops.cast(ops.take(np.arange(600), ops.cast(x, "int32")), x.dtype)
        ),
        lambda x: (
            x * 0
            + ops.cast(
                ops.take(np.arange(600), ops.cast(wide(x), "int32")), x.dtype
            )
        ),
        [257.0, 259.0, 261.0, 263.0],
        "bfloat16",
        {"Cast"},
    ),
    "denormal": (
        lambda x: ops.sqrt(x * x) * 1e3,
        lambda x: ops.abs(x) * 1e3,
        1e-5,
        "float16",
        {"Mul"},
    ),
    "angle": (
        lambda x: ops.sin(x),
        lambda x: ops.cast(ops.sin(wide(x)), x.dtype),
        [500.3, 601.1, 702.2, 803.4],
        "bfloat16",
        {"Sin"},
    ),
    "state": (
        count,
        lambda x: x + x[:, :1],
        1.0,
        "bfloat16",
        {"StatelessWhile"},
    ),
    "backward only": (
        gradient_that_overflows,
        gradient_in_float32,
        300.0,
        "float16",
        {"Square"},
    ),
}


def model_of(function, dtype):
    keras.config.set_dtype_policy(f"mixed_{dtype}")
    x = inputs = keras.Input((4,))
    if function in (gradient_that_overflows, gradient_in_float32):
        x = layers.Dense(4, kernel_initializer="identity", name="before")(x)
    is_open = function in MENDED_AT_THE_DOOR
    x = Code(function, name="code", autocast=not is_open)(x)
    x = layers.Dense(1, dtype="float32", kernel_initializer="ones")(x)
    model = keras.Model(inputs, x)
    model.compile(
        tfamp.wrap_optimizer("sgd"), loss="mse", auto_scale_loss=False
    )
    return model


# What the door has rounded, no code behind it mends.
MENDED_AT_THE_DOOR = {
    FAULTS[kind][1] for kind in ("resolution", "equality", "index", "angle")
}


def batch_of(values):
    x = np.ones((4, 4), "float32") * np.reshape(np.float32(values), (-1, 1))
    return x, np.zeros((4, 1), "float32")


@pytest.mark.parametrize(
    "kind",
    mostly_long(
        FAULTS, always=["cancellation", "index", "state", "backward only"]
    ),
)
def test_a_planted_fault_is_the_worst_and_mended_it_is_none(kind):
    fault, mended, values, dtype, operations = FAULTS[kind]
    batch = batch_of(values)
    report = compare(model_of(fault, dtype), batch)
    assert report.worst is not None, report
    assert report.worst.operation in operations, report
    assert report.worst.layer == "code", report
    # What compares rounded numbers may itself be float32.
    assert report.worst.dtype == ("float32" if kind == "equality" else dtype)
    assert report.worst.is_backward == (kind == "backward only")
    assert report.worst.fix == "tfamp.keep_float32(model)"
    assert not compare(model_of(mended, dtype), batch).errors


class Weighted(keras.Model):
    """Its training step computes the loss itself."""

    def __init__(self, in_float32):
        super().__init__()
        self.head = layers.Dense(1, kernel_initializer="ones")
        self.in_float32 = in_float32

    def call(self, x):
        return self.head(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            difference = self(x) - ops.cast(y, self.compute_dtype)
            if self.in_float32:
                difference = wide(difference)
            loss = wide(ops.mean(ops.square(difference)))
            scaled = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(scaled, variables), variables)
        return {"loss": loss}


def test_a_loss_that_a_training_step_computes_in_16_bits_is_named_by_its_line():
    keras.config.set_dtype_policy("mixed_float16")
    batch = batch_of(300.0)
    reports = {}
    for in_float32 in (False, True):
        model = Weighted(in_float32)
        model(batch[0])
        model.compile(tfamp.wrap_optimizer("sgd"), auto_scale_loss=False)
        before = model.get_weights()
        reports[in_float32] = compare(model, batch)
        np.testing.assert_array_equal(before[0], model.get_weights()[0])
    worst = reports[False].worst
    assert worst.operation == "Square"
    assert not worst.is_backward
    source = pathlib.Path(__file__).read_text().splitlines()
    line = int(worst.line.partition(":")[2])
    assert "ops.square(difference)" in source[line - 1]
    assert not reports[True].errors


def test_one_replica_is_told_from_the_others(mirrored):
    with mirrored(2).scope():
        model = model_of(FAULTS["range"][0], "float16")
    report = compare(model, batch_of([1.0, 2.0, 3.0, 300.0]))
    assert report.replicas == 2
    assert report.worst.operation == "Square"
    assert report.worst.replicas == (1,)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_gradient_that_is_nothing_but_rounding_is_no_error(dtype):
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(f"mixed_{dtype}")
    inputs = keras.Input((8, 16))
    # A softmax does not change with the bias of its keys.
    x = layers.MultiHeadAttention(2, 8)(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(1)(x))
    model.compile("sgd", "mse", auto_scale_loss=False)
    tfamp.keep_float32(model)
    x = np.random.default_rng(0).normal(size=(4, 8, 16)).astype("float32")
    report = compare(model, (x, x[..., :1]))
    assert report.operations > 40
    assert not report.errors
    assert report.gradients.size < 0.1


def test_a_small_sum_of_large_terms_is_named():
    def difference(x):
        # 2048 and -2048, and what float16 does not hold beside them.
        ends = ops.concatenate([x, -x], -1)
        return ops.sum(ends + ops.cast(0.4, x.dtype), -1, keepdims=True)

    model = model_of(difference, "float16")
    assert compare(model, batch_of(2048.0)).worst.operation == "Sum"


def test_what_cannot_be_compared_is_told_in_one_line():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    with pytest.raises(tfamp.InputError, match="not compiled"):
        compare(model, batch_of(1.0))
    with pytest.raises(tfamp.InputError, match="got list"):
        compare([], batch_of(1.0))
