"""Every way to write a loss: the numbers of the global batch, by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from benchmarks.global_batch import REFERENCES, differences
from tests.conftest import first_always, mostly_slow
from tfamp.distribute.strategy import distribute_batches

SPLITS = [(r, k) for r in (1, 2, 3) for k in (1, 2, 3)]


# One of each way to be a mean or a sum, of rows or of tokens.
KINDS = [
    *("mask_zero", "mean_with_sample_weight", "token weights"),
    *("own scalar sum", "add_loss vector", "two outputs with masks"),
]


@pytest.mark.parametrize("case", mostly_slow(REFERENCES, always=KINDS))
def test_update_and_loss_of_three_microbatches_are_those_by_hand(
    case, mirrored
):
    found = differences(case, mirrored(1), 3, evaluates=False)

    assert max(found) < 1e-5


@pytest.mark.parametrize(
    "case", first_always(["mask_zero", "own scalar sum"], 1)
)
def test_update_and_loss_of_two_replicas_are_those_by_hand(case, mirrored):
    found = differences(case, mirrored(2), 1)

    assert max(found) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("replicas", "microbatches"), SPLITS)
@pytest.mark.parametrize("case", REFERENCES)
def test_update_and_loss_are_those_by_hand_on_every_split(
    case, replicas, microbatches, jit, mirrored
):
    found = differences(case, mirrored(replicas), microbatches, jit)

    assert max(found) < 1e-5


def linear(loss):
    model = keras.Sequential(
        [
            keras.Input([1]),
            keras.layers.Dense(1, use_bias=False, kernel_initializer="ones"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), loss=loss)
    return model


def four_rows():
    x = np.array([[1.0], [2.0], [3.0], [6.0]], "float32")
    return tf.data.Dataset.from_tensor_slices((x, 0 * x)).batch(4)


def root_mean_square(y, outputs):
    return keras.ops.sqrt(keras.ops.mean(keras.ops.square(outputs - y)))


@pytest.mark.parametrize(
    "loss",
    [
        root_mean_square,
        keras.losses.Dice(),
        keras.losses.Dice(reduction="sum"),
        keras.losses.Tversky(),
    ],
    ids=["own", "Dice", "summed Dice", "Tversky"],
)
def test_what_is_neither_mean_nor_sum_is_refused_in_pieces(loss):
    x = np.array([[0.1], [0.2], [0.7], [0.6]], "float32")
    y = np.array([[0.0], [1.0], [1.0], [1.0]], "float32")
    with pytest.raises(tfamp.InputError, match="neither a mean nor a sum"):
        tfamp.fit(linear(loss), x, y, batch_size=4, microbatches=2, verbose=0)


def test_a_loss_of_pairs_of_rows_is_refused_in_pieces():
    x = np.array([[0.1, 1.0], [0.2, 0.5], [0.7, 0.3], [0.6, 0.2]], "float32")
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.Circle())
    y = np.array([0, 0, 1, 1])
    with pytest.raises(tfamp.InputError, match="neither a mean nor a sum"):
        tfamp.fit(model, x, y, batch_size=4, microbatches=2, verbose=0)


def test_what_is_neither_mean_nor_sum_trains_in_one_piece():
    model = linear(root_mean_square)

    history = tfamp.fit(model, four_rows(), verbose=0).history

    np.testing.assert_allclose(history["loss"], np.sqrt(50 / 4), rtol=1e-6)


def with_keras_loss(y, outputs):
    return keras.losses.MeanSquaredError()(y, outputs)


def test_a_loss_object_within_a_function_is_the_same_on_two_replicas(mirrored):
    with mirrored(2).scope():
        model = linear(with_keras_loss)

    history = tfamp.fit(model, four_rows(), verbose=0).history

    # The mean of squares is 50 / 4, its gradient twice that.
    np.testing.assert_allclose(history["loss"], 12.5, rtol=1e-6)
    np.testing.assert_allclose(
        model.get_weights()[0], [[1 - 0.1 * 25]], rtol=1e-6
    )


def test_a_loss_that_is_0_on_the_first_batch_is_looked_at_elsewhere():
    def hinge_sum(y, outputs):
        return keras.ops.sum(keras.ops.relu(outputs - y))

    model = linear(hinge_sum)
    x = np.array([[1.0], [2.0], [3.0], [6.0]], "float32")
    # Outputs are the labels in the first batch, and 1 more in the second.
    data = tf.data.Dataset.from_tensor_slices(
        (np.concatenate([x, x]), np.concatenate([x, x - 1]))
    ).batch(4)

    history = tfamp.fit(model, data, microbatches=2, verbose=0).history

    np.testing.assert_allclose(history["loss"], (0 + 4) / 2, rtol=1e-6)


class Counting(keras.Model):
    """Counts its steps in a weight, a metric and a seed."""

    def __init__(self):
        super().__init__()
        self.dropout = keras.layers.Dropout(0.5, seed=3)
        self.dense = keras.layers.Dense(1)
        self.count = self.add_weight(
            shape=(), initializer="zeros", trainable=False
        )
        self.mine = keras.metrics.Sum(name="mine")

    def call(self, x, training=None):
        if training:
            self.count.assign_add(1.0)
        return self.dense(self.dropout(x, training=training))

    def compute_loss(self, *arguments, **options):
        self.mine.update_state(1.0)
        return super().compute_loss(*arguments, **options)


@pytest.mark.parametrize("steps_per_loop", [1, 3])
def test_no_part_of_a_step_runs_where_data_of_unknown_length_end(
    steps_per_loop,
):
    x = np.ones((8, 4), "float32")
    known = tf.data.Dataset.from_tensor_slices((x, x[:, :1]))
    known = known.batch(4, drop_remainder=True)
    seeds = []
    for data in (known, known.filter(lambda *batch: True)):
        model = Counting()
        model.compile("sgd", "mse")

        history = tfamp.fit(
            model, data, verbose=0, steps_per_loop=steps_per_loop
        ).history

        assert float(model.count.numpy()) == 2.0
        assert history["mine"] == [2.0]
        seeds.append(model.dropout.seed_generator.state.numpy())
    np.testing.assert_array_equal(*seeds)


def test_a_univariate_series_without_drop_remainder_trains_in_pieces():
    model = keras.Sequential([keras.Input([4, 1]), keras.layers.Dense(2)])
    model.compile("sgd", loss="mse")
    x = np.ones((3, 4, 1), "float32")
    data = tf.data.Dataset.from_tensor_slices((x, np.ones((3, 4, 2)))).batch(2)

    history = tfamp.fit(model, data, microbatches=2, verbose=0).history

    assert np.isfinite(history["loss"]).all()


def test_a_tuple_of_one_stays_a_tuple_of_one():
    ones = np.ones((4, 3), "float32")
    data = tf.data.Dataset.from_tensors(((ones, ones),))

    share = next(iter(distribute_batches(tf.distribute.get_strategy(), data)))

    assert [len(share.data), len(share.data[0])] == [1, 2]


def test_no_batch_of_a_generator_is_lost_to_a_trial():
    model = linear(lambda y, outputs: keras.ops.sum(keras.ops.square(outputs)))
    model.optimizer.learning_rate = 0.0
    # More batches than anything takes in advance.
    batches = (
        (np.full((2, 1), float(i), "float32"), np.zeros((2, 1), "float32"))
        for i in range(1, 41)
    )

    history = tfamp.fit(model, batches, microbatches=2, verbose=0).history

    mean = np.mean([2.0 * i**2 for i in range(1, 41)])
    np.testing.assert_allclose(history["loss"], mean, rtol=1e-5)


class Branching(keras.Model):
    """A mean in evaluation, and a sum in training."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        errors = keras.ops.square(y - y_pred)
        return keras.ops.sum(errors) if training else keras.ops.mean(errors)


def test_of_a_loss_that_knows_training_the_one_that_trains_is_tried(mirrored):
    x = np.arange(1, 9, dtype="float32")[:, None] / 8
    with mirrored(2).scope():
        model = Branching()
        model.compile(keras.optimizers.SGD(0.01))
    history = tfamp.fit(model, x, 0 * x, batch_size=8, shuffle=False, verbose=0)
    total = np.sum(x.astype("float64") ** 2)
    np.testing.assert_allclose(history.history["loss"], [total], rtol=1e-5)
    expected = 1 - 0.01 * 2 * total
    np.testing.assert_allclose(model.dense.kernel, [[expected]], rtol=1e-5)
    loss = tfamp.evaluate(model, x, 0 * x)["loss"]
    outputs = x * expected + np.array(model.dense.bias)
    np.testing.assert_allclose(loss, np.mean(outputs**2), rtol=1e-5)


def test_a_loss_may_be_a_number_of_python_on_replicas(mirrored):
    with mirrored(2).scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", lambda y, outputs: 3)
    x = np.ones((4, 1), "float32")
    assert tfamp.evaluate(model, x, x)["loss"] == 3
