"""Losses of own train_steps that are other ones on several replicas."""

import keras
import pytest
import tensorflow as tf

import tfamp


class Own(keras.Model):
    reduction = None
    is_by_hand = False

    def train_step(self, data):
        x, y = data
        weights = self.trainable_variables

        def loss_fn():
            return self.loss_of(self(x, training=True), y)

        if self.is_by_hand:
            with tf.GradientTape() as tape:
                loss = loss_fn()
                scaled = self.optimizer.scale_loss(loss)
            gradients = tape.gradient(scaled, [w.value for w in weights])
        else:
            loss, gradients = tfamp.value_and_gradients(
                loss_fn, weights, self.optimizer, self.reduction
            )
        self.optimizer.apply(gradients, weights)
        return {"loss": loss}


def mean(outputs, y):
    return keras.ops.mean(keras.ops.square(outputs - y))


def total(outputs, y):
    return keras.ops.sum(keras.ops.square(outputs - y))


def of_keras(reduction):
    def loss(outputs, y):
        return keras.losses.MeanSquaredError(reduction=reduction)(y, outputs)

    return loss


def mean_by_division(outputs, y):
    return total(outputs, y) / keras.ops.cast(keras.ops.size(y), "float32")


def rules(strategy, loss_of, reduction=None, is_by_hand=False):
    with strategy.scope():
        inputs = keras.Input([2])
        model = Own(inputs, keras.layers.Dense(1)(inputs))
        model.loss_of, model.reduction = loss_of, reduction
        model.is_by_hand = is_by_hand
        model.compile(tfamp.wrap_optimizer("sgd"))
    batch = tf.ones([4, 2]), tf.ones([4, 1])
    return [each.rule for each in tfamp.lint(model, batch)]


@pytest.mark.parametrize(
    ("loss_of", "reduction", "expected"),
    [
        (mean, None, []),
        (mean_by_division, None, []),
        (total, None, ["unknown-reduction"]),
        (total, "sum", []),
        (of_keras("sum"), None, []),
        (of_keras("sum_over_batch_size"), None, []),
    ],
)
def test_a_sum_that_is_not_said_to_be_one_is_found(
    loss_of, reduction, expected, mirrored
):
    assert rules(mirrored(2), loss_of, reduction) == expected


@pytest.mark.parametrize(
    ("loss_of", "expected"),
    [
        (mean, ["undivided-loss"]),
        (lambda outputs, y: mean(outputs, y) / 2, []),
        (total, []),
        (of_keras("sum_over_batch_size"), []),
    ],
)
def test_a_mean_that_replicas_would_add_up_is_found(
    loss_of, expected, mirrored
):
    assert rules(mirrored(2), loss_of, is_by_hand=True) == expected


def test_one_replica_has_nothing_to_add_up(mirrored):
    assert rules(mirrored(1), total) == []
