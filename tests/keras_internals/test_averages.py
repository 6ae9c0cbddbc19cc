"""Moving averages are found, also in several optimizers."""

import keras
import numpy as np
import tensorflow as tf

from tests.keras_internals.trainees import several_optimizers
from tfamp import keras_internals


def test_averages_and_their_frequencies_are_found_in_several_optimizers():
    optimizer = several_optimizers()
    weight = keras.Variable([1.0], name="weight")
    optimizer.build([weight])
    (averaging,) = keras_internals.averaging_optimizers(optimizer)
    with keras_internals.average_overwrite_deferred(optimizer) as frequencies:
        assert frequencies == [(averaging, 3)]
        assert averaging.ema_overwrite_frequency is None
    assert averaging.ema_overwrite_frequency == 3
    optimizer.apply([tf.constant([1.0])], [weight])
    ((variable, average),) = keras_internals.moving_averages(averaging)
    assert variable is weight
    np.testing.assert_array_equal(average.numpy(), weight.numpy())


def test_optimizers_that_leave_averages_are_told_through_a_scaler():
    weight = keras.Variable([1.0])
    for use_ema in (False, True):
        inner = keras.optimizers.SGD(use_ema=use_ema)
        optimizer = keras.optimizers.LossScaleOptimizer(inner)
        optimizer.build([weight])
        assert keras_internals.leaves_averages(optimizer) is use_ema
        assert keras_internals.leaves_averages(inner) is use_ema
