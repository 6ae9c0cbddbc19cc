"""Variables are kept and read, and reads and assignments seen."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tfamp import keras_internals


def test_a_variable_is_kept_in_another_dtype_and_put_back():
    class Doubled(keras.Variable):
        @property
        def value(self):
            return 2 * super().value

    weight = keras.Variable([3.0])
    wide, cls = keras_internals.stored(weight), type(weight)
    narrow = tf.Variable([5.0], dtype=tf.bfloat16)
    keras_internals.replace_value(weight, narrow, Doubled)
    assert weight.dtype == "float32"
    assert keras_internals.stored(weight) is narrow
    np.testing.assert_array_equal(tf.cast(weight.value, tf.float32), [10.0])
    keras_internals.replace_value(weight, wide, cls)
    np.testing.assert_array_equal(weight.numpy(), [3.0])


def test_reads_of_variables_are_noted_with_the_dtype_they_are_read_in():
    layer = layers.Dense(1, dtype="mixed_bfloat16")
    layer.build((None, 2))
    found = []

    def note(variable):
        found.append((variable.name, keras_internals.autocast_dtype()))

    with keras_internals.reads_noted(layer.trainable_variables, note):
        layer(np.zeros((1, 2), "float32"))
        tf.convert_to_tensor(layer.bias.value)
    assert sorted(found, key=str) == [
        ("bias", "bfloat16"),
        ("bias", None),
        ("kernel", "bfloat16"),
    ]
    layer(np.zeros((1, 2), "float32"))
    assert len(found) == 3


def test_a_scope_that_gives_variables_other_values_is_known():
    assert not keras_internals.in_stateless_scope()
    with keras.StatelessScope():
        assert keras_internals.in_stateless_scope()
