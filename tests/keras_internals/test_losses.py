"""Losses reduce, and are added up, by the functions that are replaced."""

import keras
import pytest
import tensorflow as tf
from keras import layers

from tfamp import keras_internals


def test_losses_of_layers_are_added_in_float32():
    inputs = keras.Input((3,), dtype="float16")
    model = keras.Sequential(
        [inputs, layers.ActivityRegularization(l2=1.0, dtype="float16")]
    )
    model.compile("adam", loss="mse")
    x = tf.ones((2, 3), "float16")
    with pytest.raises(tf.errors.InvalidArgumentError, match="half tensor"):
        model.compute_loss(x, x, model(x))
    with keras_internals.additional_losses_in_float32(model):
        loss = model.compute_loss(x, x, model(x))
    assert loss.dtype == tf.float32
    assert "_aggregate_additional_loss" not in vars(model)


def test_a_loss_before_its_reduction_is_weighted_and_not_yet_divided():
    outputs = tf.ones([2, 3, 1])
    keras_internals.attach_mask(
        outputs, tf.constant([[True, True, False], [False] * 3])
    )
    loss = keras.losses.MeanSquaredError()

    values, weights, mask, is_scalar = keras_internals.unreduced_loss(
        loss, tf.zeros([2, 3, 1]), outputs, tf.constant([[2.0], [5.0]])
    )

    assert values.numpy().tolist() == [[2, 2, 0], [0, 0, 0]]
    assert weights.numpy().tolist() == [[2, 2, 0], [0, 0, 0]]
    assert int(tf.reduce_sum(tf.cast(mask, tf.int32))) == 2
    assert not is_scalar
    assert keras_internals.is_loss_of_rows(loss)


def test_terms_of_a_loss_are_made_by_other_functions_and_put_back():
    inputs = keras.Input([1])
    layer = keras.layers.Dense(1, name="a", kernel_regularizer="l2")
    outputs = {"a": layer(inputs), "b": keras.layers.Identity()(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss={"a": "mse", "b": "mae"})
    ones = {"a": tf.ones([2, 1]), "b": tf.ones([2, 1])}
    before = float(model.compute_loss(None, ones, ones))
    counted = []

    with keras_internals.loss_terms_replaced(
        model,
        leaf=lambda loss, y, y_pred, weight: tf.constant(10.0),
        add=lambda loss: tf.constant(3.0),
        count=lambda metric, value: counted.append(float(value)),
    ):
        within = float(model.compute_loss(None, ones, ones))

    assert within == 23.0
    assert counted == [10.0, 10.0]
    assert float(model.compute_loss(None, ones, ones)) == before
