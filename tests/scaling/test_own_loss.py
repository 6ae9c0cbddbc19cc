"""The loss of a train_step of its own: that of the global batch, by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long

# Five rows: replicas have different numbers of them.
X = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]], "float32")
WEIGHTS = np.array([1.0, 0.0, 0.0, 2.0, 1.0], "float32")
RATE = 2.0**-9

MEAN, SUM = 55 / 5, 55.0
# 1 + 2 * 16 + 25, of weights that add up to 4.
WEIGHTED = 58 / 4
MASKED = (1 + 16 + 25) / 3


def squares(model):
    return keras.ops.square(model.outputs_of_batch)


def keras_loss(reduction, weights=None):
    def loss(model):
        made = keras.losses.MeanSquaredError(reduction=reduction)
        outputs = model.outputs_of_batch
        given = None if weights is None else model.weights_of_batch
        return made(tf.zeros_like(outputs), outputs, given)

    return loss


def masked(model):
    outputs = model.outputs_of_batch
    outputs._keras_mask = model.weights_of_batch > 0
    return keras.losses.MeanSquaredError()(tf.zeros_like(outputs), outputs)


def of_compile(model):
    outputs = model.outputs_of_batch
    return model.compute_loss(y=tf.zeros_like(outputs), y_pred=outputs)


# By what it is written with: the loss, the argument, and the loss by hand.
LOSSES = {
    "mean": (lambda m: keras.ops.mean(squares(m)), None, MEAN),
    "mean, told": (lambda m: keras.ops.mean(squares(m)), "mean", MEAN),
    "sum": (lambda m: keras.ops.sum(squares(m)), "sum", SUM),
    "loss object": (keras_loss("sum_over_batch_size"), None, MEAN),
    "loss object, as a sum": (
        keras_loss("sum_over_batch_size"),
        "sum",
        MEAN,
    ),
    "summed loss object": (keras_loss("sum"), None, SUM),
    "weighted": (keras_loss("mean_with_sample_weight", True), None, WEIGHTED),
    "masked": (masked, None, MASKED),
    "compute_loss": (of_compile, None, MEAN),
    "mean and loss object": (
        lambda m: keras.ops.mean(squares(m)) + of_compile(m),
        None,
        2 * MEAN,
    ),
}


class Own(keras.Model):
    def train_step(self, data):
        x, self.weights_of_batch = data

        def loss_fn():
            self.outputs_of_batch = self(x, training=True)
            return self.loss_of(self)

        loss, gradients = tfamp.value_and_gradients(
            loss_fn, self.trainable_variables, self.optimizer, self.reduction
        )
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"mine": loss}


@pytest.mark.parametrize(
    ("case", "replicas"),
    mostly_long(
        [(case, replicas) for case in LOSSES for replicas in (1, 2, 3)],
        always=[
            ("mean", 2),
            ("sum", 2),
            ("loss object", 2),
            ("weighted", 2),
            ("masked", 2),
            ("compute_loss", 2),
        ],
    ),
)
def test_update_and_log_are_those_of_the_global_batch(case, replicas, mirrored):
    loss_of, reduction, expected = LOSSES[case]
    with mirrored(replicas).scope():
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        inputs = keras.Input([1])
        model = Own(inputs, dense(inputs))
        model.loss_of, model.reduction = loss_of, reduction
        model.compile(
            tfamp.wrap_optimizer(keras.optimizers.SGD(RATE)), loss="mse"
        )
    data = tf.data.Dataset.from_tensor_slices((X, WEIGHTS)).batch(5)

    history = tfamp.fit(model, data, verbose=0).history

    np.testing.assert_allclose(history["mine"], expected, rtol=1e-6)
    # Of the square of what is proportional to the weight, which is 1.
    update = 1 - model.get_weights()[0][0, 0]
    np.testing.assert_allclose(update, RATE * 2 * expected, rtol=1e-5)


def test_a_hand_written_loop_on_replicas_takes_the_mean_too(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        weight = keras.Variable([1.0])
        optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD(RATE))
        optimizer.build([weight])
    rows = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(
            X[2 * context.replica_id_in_sync_group :][:2]
        )
    )

    @tf.function
    def run():
        def step(x):
            loss, gradients = tfamp.value_and_gradients(
                lambda: tf.reduce_mean((weight.value * x) ** 2),
                [weight],
                optimizer,
            )
            optimizer.apply(gradients, [weight])
            return loss

        return strategy.reduce("MEAN", strategy.run(step, (rows,)), None)

    # 1, 4, 9 and 16.
    assert float(run()) == 7.5
    assert float(weight.numpy()[0]) == 1 - RATE * 15


@pytest.mark.parametrize(
    ("loss", "reduction", "line"),
    [
        (tf.ones([2]), None, r"shape \(2,\); return one number"),
        (tf.ones([]), "average", "expected 'mean' or 'sum'"),
    ],
)
def test_what_has_no_one_meaning_is_refused(loss, reduction, line):
    with pytest.raises(tfamp.InputError, match=line):
        tfamp.value_and_gradients(
            lambda: loss, [], keras.optimizers.SGD(), reduction
        )


class OfGuides(Own):
    """As Keras's guides write it: a tape, and a mean of losses to log."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mean_of_losses = keras.metrics.Mean("logged")

    def train_step(self, data):
        x, self.weights_of_batch = data
        with tf.GradientTape() as tape:
            self.outputs_of_batch = self(x, training=True)
            loss = self.loss_of(self)
            scaled = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        gradients = tape.gradient(scaled, [v.value for v in variables])
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self.mean_of_losses.update_state(loss)
        return {"mine": loss, "logged": self.mean_of_losses.result()}

    def test_step(self, data):
        x, self.weights_of_batch = data
        self.outputs_of_batch = self(x)
        return {"mine": self.loss_of(self)}


OPTIMIZERS = {
    "plain": keras.optimizers.SGD,
    "scaled": lambda rate: tfamp.LossScaleOptimizer(keras.optimizers.SGD(rate)),
    "multi": lambda rate: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(keras.optimizers.SGD(rate))
    ),
}


def of_guides(case, optimizer, strategy):
    with strategy.scope():
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        inputs = keras.Input([1])
        model = OfGuides(inputs, dense(inputs))
        model.loss_of = LOSSES[case][0]
        model.compile(OPTIMIZERS[optimizer](RATE), loss="mse")
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "optimizer", "replicas"),
    mostly_long(
        [
            (case, optimizer, replicas)
            for case in (
                *("loss object", "summed loss object", "weighted"),
                *("masked", "compute_loss"),
            )
            for optimizer in OPTIMIZERS
            for replicas in (1, 2, 3)
        ],
        always=[("compute_loss", "plain", 2), ("masked", "scaled", 2)],
    ),
)
def test_a_tape_of_ones_own_has_the_global_batch_too(
    case, optimizer, replicas, mirrored
):
    expected = LOSSES[case][2]
    model = of_guides(case, optimizer, mirrored(replicas))
    data = tf.data.Dataset.from_tensor_slices((X, WEIGHTS)).batch(5)
    if case != "summed loss object":
        evaluated = tfamp.evaluate(model, data)["mine"]
        np.testing.assert_allclose(evaluated, expected, rtol=1e-6)
    history = tfamp.fit(model, data, verbose=0).history
    update = 1 - model.get_weights()[0][0, 0]
    np.testing.assert_allclose(update, RATE * 2 * expected, rtol=1e-5)
    np.testing.assert_allclose(history["mine"], expected, rtol=1e-6)
    np.testing.assert_allclose(history["logged"], expected, rtol=1e-6)


@pytest.mark.parametrize("case", ["mean", "loss object"])
def test_a_tape_whose_loss_nothing_reduces_is_said(
    case, mirrored, warnings_of_absl
):
    model = of_guides(case, "plain", mirrored(2))
    data = tf.data.Dataset.from_tensor_slices((X, WEIGHTS)).batch(5)
    tfamp.fit(model, data, verbose=0)
    lines = [line for line in warnings_of_absl if "sums gradients" in line]
    assert len(lines) == (case == "mean")
    assert all("of OfGuides" in line for line in lines)
