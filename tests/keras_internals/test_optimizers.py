"""What optimizers keep of each variable is found."""

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals


def test_optimized_variables_are_those_it_was_built_with():
    variables = [keras.Variable([1.0]), keras.Variable([2.0])]
    optimizer = keras.optimizers.Adam()
    optimizer.build(variables)
    found = keras_internals.optimized_variables(optimizer)
    assert [id(each) for each in found] == [id(each) for each in variables]


def test_moments_and_decay_of_a_variable_are_found():
    kernel, bias = keras.Variable([1.0]), keras.Variable([1.0], name="bias")
    adam = keras.optimizers.AdamW(weight_decay=0.5)
    adam.exclude_from_weight_decay(var_names=["bias"])
    sgd = keras.optimizers.SGD(momentum=0.5)
    for optimizer in (adam, sgd):
        optimizer.build([kernel, bias])
        optimizer.apply([tf.constant([2.0]), tf.constant([0.0])])
    first, second = keras_internals.adam_moments(adam, kernel.value)
    np.testing.assert_allclose(first.numpy(), [0.2], rtol=1e-6)
    np.testing.assert_allclose(second.numpy(), [0.004], rtol=1e-6)
    momentum = keras_internals.sgd_momentum(sgd, kernel.value)
    np.testing.assert_allclose(momentum.numpy(), [-0.02], rtol=1e-6)
    assert keras_internals.decays(adam, kernel.value)
    assert not keras_internals.decays(adam, bias.value)
    assert not keras_internals.decays(sgd, kernel.value)
    assert keras_internals.updates_as(adam, keras.optimizers.Adam)
    assert not keras_internals.updates_as(sgd, keras.optimizers.Adam)


def test_variables_of_an_optimizer_are_made_by_another_function():
    weight, made = keras.Variable([[1.0, 2.0]], name="kernel"), []

    def make(reference, name, initializer):
        assert reference is weight
        made.append(name)
        return keras.Variable(tf.zeros([1]), name=f"part_{name}")

    optimizer = keras.optimizers.Adam(use_ema=True, name="own")
    with keras_internals.variables_made_by(optimizer, make):
        optimizer.build([weight])
    assert made == ["average", "momentum", "velocity"]
    parts = [v for v in optimizer.variables if "part_" in v.name]
    assert [v.path for v in parts] == [f"own/part_{name}" for name in made]
    assert "add_variable_from_reference" not in vars(optimizer)
    assert keras_internals.variable_index(optimizer, weight) == 0
