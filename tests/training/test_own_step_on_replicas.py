"""A model's own `train_step` on replicas, against Keras on one device."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long


class Own(keras.Model):
    """As Keras's guides write it."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = self.compute_loss(x, y, outputs, sample_weight)
        weights = self.trainable_weights
        gradients = tape.gradient(loss, weights)
        self.optimizer.apply(gradients, weights)
        return self.compute_metrics(x, y, outputs, sample_weight)


class Penalty(keras.layers.Layer):
    """Adds a loss for each time of each row, which Keras sums up."""

    def __init__(self, **options):
        super().__init__(**options)
        self.supports_masking = True

    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x), axis=-1))
        return x


def build(dtype, clipping, is_masked, adds_loss):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input([3, 4], dtype=dtype)
    if is_masked:
        x = keras.layers.Masking(dtype=dtype)(x)
    x = keras.layers.Dense(5, activation="tanh", dtype=dtype)(x)
    if adds_loss:
        x = Penalty(dtype=dtype)(x)
    model = Own(inputs, keras.layers.Dense(2, dtype=dtype)(x))
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, **clipping),
        "mse",
        metrics=["mae"],
        weighted_metrics=["mse"],
        jit_compile=False,
    )
    return model


def batches(rows, batch, dtype):
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, 3, 4)).astype(dtype)
    x[:, 1:] *= random.integers(0, 2, (rows, 2, 1))
    return tf.data.Dataset.from_tensor_slices(
        (
            x,
            3 * random.standard_normal((rows, 3, 2)).astype(dtype),
            random.uniform(0.1, 2, (rows, 3)).astype(dtype),
        )
    ).batch(batch)


@pytest.fixture
def floatx():
    """Leaves Keras's default dtype as it was."""
    before = keras.config.floatx()
    yield
    keras.config.set_floatx(before)


CLIPPING = {
    "whole": {},
    "by norm": {"clipnorm": 0.3},
    "by global norm": {"global_clipnorm": 0.3},
    "by value": {"clipvalue": 0.1},
}
# Of rows and of batches: in the last batch shares differ, or some have none.
SIZES = {"equal": (12, 6), "other": (11, 6), "none": (13, 6)}


@pytest.mark.parametrize(
    ("clipping", "sizes", "is_masked", "adds_loss", "replicas"),
    mostly_long(
        [
            (clipping, sizes, is_masked, adds_loss, replicas)
            for clipping in CLIPPING
            for sizes in SIZES
            for is_masked in (False, True)
            for adds_loss in (False, True)
            for replicas in (2, 3)
        ],
        always=[
            ("by norm", "equal", True, False, 2),
            ("by global norm", "none", False, True, 2),
            ("by value", "other", True, True, 3),
        ],
    ),
)
def test_the_update_and_metrics_are_those_of_the_global_batch(
    clipping, sizes, is_masked, adds_loss, replicas, mirrored, floatx
):
    arguments = CLIPPING[clipping], is_masked, adds_loss
    keras.config.set_floatx("float64")
    model = build("float64", *arguments)
    begin = [each.astype("float32") for each in model.get_weights()]
    model.set_weights(begin)
    right = model.fit(
        batches(*SIZES[sizes], "float64"), epochs=2, shuffle=False, verbose=0
    ).history

    keras.config.set_floatx("float32")
    with mirrored(replicas).scope():
        other = build("float32", *arguments)
        other.set_weights(begin)
    history = tfamp.fit(
        other, batches(*SIZES[sizes], "float32"), epochs=2, verbose=0
    ).history

    for made, wanted in zip(
        other.get_weights(), model.get_weights(), strict=True
    ):
        np.testing.assert_allclose(made, wanted, rtol=0, atol=3e-6)
    for name in ("mae", "mse"):
        np.testing.assert_allclose(history[name], right[name], rtol=1e-5)


class Overwriting(keras.Model):
    """Has a weight whose "gradient" is its next value, as float8 scales are."""

    def __init__(self):
        super().__init__()
        self.next = self.add_weight(name="next", initializer="zeros")
        self.next.overwrite_with_gradient = True

    def call(self, x):
        return x * self.next

    def train_step(self, data):
        x, y = data
        self.compute_loss(x, y, self(x, training=True))
        replica = tf.distribute.get_replica_context()
        value = 3.0 + tf.cast(replica.replica_id_in_sync_group, "float32")
        self.optimizer.apply([value], [self.next])
        return {}


def test_a_next_value_is_no_part_of_a_sum(mirrored):
    with mirrored(2).scope():
        model = Overwriting()
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    tfamp.fit(model, np.ones((4, 1)), np.ones((4, 1)), batch_size=4, verbose=0)
    assert float(model.next.numpy()) == 4.0
