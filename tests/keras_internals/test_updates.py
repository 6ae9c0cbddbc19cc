"""Optimizers sum, clip, decay and update by the methods that are replaced."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.keras_internals.trainees import several_optimizers
from tfamp import keras_internals


@pytest.mark.parametrize(
    "make", [lambda: keras.optimizers.SGD(0.5), several_optimizers]
)
def test_reduced_gradients_are_not_summed_again(make, mirrored):
    with mirrored(2).scope():
        weight = keras.Variable([1.0], name="weight")
        optimizer = make()
        optimizer.build([weight])

    def step():
        with keras_internals.average_overwrite_deferred(optimizer):
            optimizer.apply([tf.constant([1.0])], [weight])

    mirrored(2).run(step)
    # Keras sums over the replicas.
    np.testing.assert_array_equal(weight.numpy(), [0.0])
    with keras_internals.gradients_already_reduced(optimizer):
        mirrored(2).run(step)
    np.testing.assert_array_equal(weight.numpy(), [-0.5])
    mirrored(2).run(step)
    np.testing.assert_array_equal(weight.numpy(), [-1.5])


def test_schedules_are_computed_on_the_host_and_put_back():
    schedule = keras.optimizers.schedules.CosineDecay(
        0.1, 10, warmup_target=0.2, warmup_steps=2
    )
    optimizer = keras.optimizers.SGD(schedule)
    optimizer.build([keras.Variable([1.0])])

    @tf.function
    def rate():
        with keras_internals.schedules_on_host(optimizer):
            return keras.ops.convert_to_tensor(optimizer.learning_rate)

    graph = rate.get_concrete_function().graph
    (branch,) = [op for op in graph.get_operations() if "If" in op.type]
    assert branch.device.endswith("CPU:0")
    assert "_get_current_learning_rate" not in vars(optimizer)


def test_gradients_are_clipped_as_an_optimizer_would():
    optimizer = keras.optimizers.SGD(clipnorm=1.0)
    gradients = [tf.constant([3.0, 4.0]), None, tf.constant([0.5])]
    first, nothing, last = keras_internals.clipped(optimizer, gradients)
    np.testing.assert_allclose(first, [0.6, 0.8], rtol=1e-6)
    assert nothing is None
    np.testing.assert_array_equal(last, [0.5])


def test_the_global_norm_is_found_where_keras_would_clip_to_it():
    sgd = keras.optimizers.SGD
    found = [
        keras_internals.global_clip_norm(each)
        for each in (
            sgd(global_clipnorm=2.0),
            sgd(clipvalue=2.0),
            sgd(global_clipnorm=2.0, gradient_accumulation_steps=2),
            several_optimizers(),
        )
    ]
    assert found == [2.0, None, None, None]


def test_apply_clips_decays_and_updates_by_the_methods_that_are_replaced():
    weight = keras.Variable([8.0])
    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=0.5, weight_decay=0.5)
    optimizer.build([weight])
    seen = []

    def update(gradient, variable, learning_rate):
        seen.append((float(gradient[0]), type(variable), float(learning_rate)))

    with (
        keras_internals.gradients_already_clipped(optimizer),
        keras_internals.update_replaced(optimizer, update),
    ):
        optimizer.apply([tf.constant([4.0])], [weight])
    ((gradient, cls, rate),) = seen
    assert (gradient, rate) == (4.0, 1.0)
    assert issubclass(cls, tf.Variable)
    assert weight.numpy() == 8.0
    # And Keras's own are back: 8 decays to 4, the gradient is clipped to 0.5.
    optimizer.apply([tf.constant([4.0])], [weight])
    assert weight.numpy() == 3.5
