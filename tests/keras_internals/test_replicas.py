"""What is summed over replicas."""

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals


def test_another_function_applies_gradients_for_a_while():
    weight = keras.Variable([1.0])
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([weight])

    def doubled(own, by, gradients, variables=None):
        assert by is optimizer
        assert not keras_internals.takes_reduced_gradients(by)
        with keras_internals.gradients_already_reduced(by):
            assert keras_internals.takes_reduced_gradients(by)
        own(by, [2 * gradient for gradient in gradients], variables)

    with keras_internals.updates_replaced(doubled):
        optimizer.apply([tf.constant([1.0])], [weight])
    np.testing.assert_array_equal(weight, [-1.0])
    optimizer.apply([tf.constant([1.0])], [weight])
    np.testing.assert_array_equal(weight, [-2.0])


def test_models_know_the_scope_that_they_were_made_in(mirrored):
    def build():
        return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])

    assert not keras_internals.is_made_in_scope(build())
    with mirrored(2).scope():
        assert keras_internals.is_made_in_scope(build())
