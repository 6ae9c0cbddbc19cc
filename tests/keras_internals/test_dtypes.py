"""Layers compute, and variables are read, in the dtype they are told."""

import keras
import tensorflow as tf
from keras import layers

from tfamp import keras_internals


def test_a_replaced_policy_reaches_computation_and_is_put_back():
    shared = keras.dtype_policies.DTypePolicyMap(
        keras.dtype_policies.get("mixed_float16")
    )
    mapped = layers.Dense(1, dtype=shared, name="mapped")
    plain = layers.Dense(1, dtype="mixed_bfloat16")
    float32 = keras.dtype_policies.get("float32")
    for layer in (mapped, plain):
        layer.build((None, 2))
    with keras_internals.dtype_policy_replaced([mapped, plain], float32):
        assert mapped(tf.ones([1, 2])).dtype == tf.float32
        assert plain(tf.ones([1, 2])).dtype == tf.float32
    assert mapped(tf.ones([1, 2])).dtype == tf.float16
    assert plain(tf.ones([1, 2])).dtype == tf.bfloat16
    assert mapped.dtype_policy is shared
    assert "mapped" not in shared


def test_a_variable_is_read_as_it_is_stored_inside_a_16_bit_scope():
    variable = keras.Variable(1.0 + 2.0**-20)
    with keras_internals.autocast_scope("bfloat16"):
        assert variable.value.dtype == tf.bfloat16
        stored = keras_internals.uncast_value(variable)
    assert float(stored) == 1.0 + 2.0**-20
