"""What is summed over replicas, and by which numbers."""

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals


def test_each_strategy_numbers_its_collectives_once_and_apart():
    strategies = [
        tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) for _ in range(2)
    ]
    groups = []
    for strategy in strategies:
        keras_internals.separate_collectives(strategy)
        own = strategy.extended._collective_ops
        assert strategy.extended._cross_device_ops is own
        keras_internals.separate_collectives(strategy)
        assert strategy.extended._collective_ops is own
        groups.append(own._collective_keys._group_key)
    # Far enough for all groups that one of them has.
    assert abs(groups[0] - groups[1]) >= 1000

    to_one = tf.distribute.ReductionToOneDevice()
    chosen = tf.distribute.MirroredStrategy(["CPU:0"], to_one)
    keras_internals.separate_collectives(chosen)
    assert chosen.extended._cross_device_ops is to_one
    keras_internals.separate_collectives(tf.distribute.get_strategy())


def test_sums_of_gradients_go_through_another_function_and_back():
    weight = keras.Variable([1.0])
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([weight])

    def doubled(own, by, pairs):
        assert by is optimizer
        return own(by, [(2 * gradient, v) for gradient, v in pairs])

    with keras_internals.gradient_sums_replaced(doubled):
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
