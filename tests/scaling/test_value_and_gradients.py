"""The pieces of a hand-written step: a loss, scaled gradients, a decision."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp


@pytest.fixture(params=[False, True], ids=["eager", "traced"])
def compiled(request):
    return tf.function if request.param else lambda function: function


def test_the_loss_is_the_true_one_and_gradients_carry_the_scale(compiled):
    weight = keras.Variable([3.0, 4.0])
    optimizer = tfamp.LossScaleOptimizer(
        keras.optimizers.SGD(0.5), initial_scale=2.0**10
    )
    optimizer.build([weight])

    @compiled
    def step():
        loss, gradients = tfamp.value_and_gradients(
            lambda: tf.reduce_sum(weight.value**2), [weight], optimizer
        )
        optimizer.apply(gradients, [weight])
        return loss, gradients

    loss, (gradient,) = step()
    assert float(loss) == 25.0
    np.testing.assert_array_equal(gradient, [6 * 1024, 8 * 1024])
    np.testing.assert_array_equal(weight, [0, 0])


def test_an_optimizer_that_does_not_scale_gives_the_bare_gradient():
    weight = tf.Variable(3.0)
    loss, (gradient,) = tfamp.value_and_gradients(
        lambda: weight * weight, [weight], keras.optimizers.SGD()
    )
    assert (float(loss), float(gradient)) == (9.0, 6.0)


def test_a_float16_loss_beyond_float16_comes_back_in_float32():
    weight = keras.Variable(2.0)
    optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD())
    loss, (gradient, unused) = tfamp.value_and_gradients(
        lambda: tf.cast(weight.value, tf.float16) * 3,
        [weight, keras.Variable(0.0)],
        optimizer,
    )
    assert loss.dtype == tf.float32
    assert float(loss) == 6.0
    # 3 * 65536 is no float16; the cast in the middle makes it inf, as it must.
    assert np.isinf(float(gradient))
    assert unused is None


def test_two_optimizers_keep_two_scales_and_one_overflow_moves_one(
    strategy, compiled
):
    with strategy.scope():
        good, bad = keras.Variable([1.0]), keras.Variable([1.0])
        optimizers = [
            tfamp.LossScaleOptimizer(
                keras.optimizers.Adam(0.25), initial_scale=scale
            )
            for scale in (2.0**4, 2.0**8)
        ]
        optimizers[0].build([good])
        optimizers[1].build([bad])

    @compiled
    def run():
        def step():
            for weight, optimizer, factor in (
                (good, optimizers[0], 1.0),
                (bad, optimizers[1], np.inf),
            ):
                _, gradients = tfamp.value_and_gradients(
                    lambda w=weight, f=factor: tf.reduce_sum(w.value * f),
                    [weight],
                    optimizer,
                )
                optimizer.apply(gradients, [weight])

        strategy.run(step)

    run()
    assert float(good.numpy()[0]) == pytest.approx(0.75, rel=1e-5)
    assert float(bad.numpy()[0]) == 1.0
    assert [float(o.dynamic_scale.numpy()) for o in optimizers] == [16, 128]
    assert [int(o.skipped_steps.numpy()) for o in optimizers] == [0, 1]
    assert [int(o.iterations.numpy()) for o in optimizers] == [1, 0]


def test_apply_outside_of_a_replica_is_refused_with_the_way_in(mirrored):
    with mirrored(2).scope():
        weight = keras.Variable([1.0])
        optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD())
        optimizer.build([weight])
        with pytest.raises(ValueError, match=r"pass to strategy\.run"):
            optimizer.apply([tf.constant([1.0])], [weight])


def test_an_optimizer_made_outside_of_the_scope_is_refused(mirrored):
    optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD())
    with mirrored(2).scope():
        weight = keras.Variable([1.0])
        with pytest.raises(
            tfamp.InputError, match=r"within strategy\.scope\(\)"
        ):
            optimizer.build([weight])
