"""Whatever the optimizer: no variable of it is ever not finite."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import MUON_WORKS, first_always

OPTIMIZERS = sorted(
    name
    for name, cls in vars(keras.optimizers).items()
    if isinstance(cls, type)
    and issubclass(cls, keras.optimizers.Optimizer)
    # These wrap others.
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
    and (name != "Muon" or MUON_WORKS)
)
# Applied, then beyond what a square in float32 holds, then applied.
GRADIENTS = (1.0, 1e18, 1.9e19, -3e38, np.inf, np.nan, 1e-30, 0.0, -2.0)
APPLIED = 5


@pytest.mark.parametrize("name", first_always(OPTIMIZERS, 5))
def test_no_variable_is_ever_beyond_the_finite(name):
    weight = keras.Variable(np.ones((2, 2), "float32"))
    optimizer = tfamp.wrap_optimizer(getattr(keras.optimizers, name)())
    optimizer.build([weight])
    step = tf.function(lambda g: optimizer.apply([g], [weight]))
    for value in GRADIENTS:
        step(tf.fill([2, 2], tf.cast(value, tf.float32)))
        for variable in (weight, *optimizer.inner_optimizer.variables):
            assert np.isfinite(variable.numpy()).all(), (value, variable.path)
    assert int(optimizer.iterations.numpy()) == APPLIED
    assert int(optimizer.skipped_steps.numpy()) == len(GRADIENTS) - APPLIED


@pytest.mark.parametrize("cls", [keras.optimizers.SGD, keras.optimizers.Adam])
def test_a_method_set_on_the_instance_is_called_and_stays(cls):
    inner = cls(0.1)
    stock, calls = inner.update_step, []

    def counted(gradient, variable, learning_rate):
        calls.append(variable)
        stock(gradient, variable, learning_rate)

    inner.update_step = counted
    weight = keras.Variable(np.ones(3, "float32"))
    optimizer = tfamp.wrap_optimizer(inner)
    optimizer.build([weight])
    for _ in range(2):
        optimizer.apply([tf.ones(3)], [weight])
    assert len(calls) == 2
    assert inner.update_step is counted
    assert (weight.numpy() < 1).all()
