"""What is measured in float32 is computed in float32."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.conftest import mostly_slow
from tfamp.precision.computing import computing_in, layers_in_16_bits
from tfamp.precision.keep_float32 import keep_float32


def dtypes(model, ids):
    graph = tf.function(model).get_concrete_function(ids).graph
    return {
        output.dtype.name
        for operation in graph.get_operations()
        for output in operation.outputs
        if output.dtype.is_floating
    }


def test_a_dtype_beside_the_policy_goes_with_it_and_comes_back():
    keras.config.set_dtype_policy("mixed_float16")
    tokens = keras.Input((4,), dtype="int32")
    embedding = layers.ReversibleEmbedding(8, 16, reverse_dtype="float16")
    state = layers.LSTM(16, return_sequences=True)(embedding(tokens))
    model = keras.Model(tokens, embedding(state, reverse=True))
    # Its products alone have 16 bits then.
    keep_float32(model, outputs=False)
    ids = np.zeros((2, 4), "int32")
    assert "float16" in dtypes(model, ids)
    with computing_in("float32", layers_in_16_bits(model)):
        assert dtypes(model, ids) == {"float32"}
    assert embedding.reverse_dtype == "float16"
    assert "float16" in dtypes(model, ids)


@pytest.mark.parametrize("is_given", [False, True])
def test_constants_of_a_normalization_go_with_it(is_given):
    keras.config.set_dtype_policy("mixed_bfloat16")
    # 1000.5 has more digits than bfloat16.
    layer = layers.Normalization()
    if is_given:
        layer = layers.Normalization(mean=1000.5, variance=0.25)
    inputs = keras.Input([1])
    model = keras.Model(inputs, layer(inputs))
    if not is_given:
        layer.adapt(np.float32([[1000], [1001]]))
    x = np.float32([[1001]])
    assert np.float32(model(x)) != 1.0
    with computing_in("float32", layers_in_16_bits(model)):
        assert np.float32(model(x)) == 1.0
    assert layer.mean.dtype == "bfloat16"


@pytest.mark.parametrize("kind", mostly_slow(["int8", "int4"], always=["int8"]))
def test_a_kernel_of_integers_stays_one(kind):
    keras.config.set_dtype_policy("mixed_bfloat16")
    dense = layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input([2]), dense])
    # Numbers of int8, and of int4 too.
    model.set_weights([np.float32([[127], [-127]])])
    dense.quantize(kind)
    before = dense.dtype_policy.name
    with computing_in("float32", layers_in_16_bits(model)):
        found = model(np.float32([[1, 0], [0, 1], [1, -1]]))
        assert found.dtype == "float32"
    np.testing.assert_allclose(
        np.ravel(found), [127, -127, 254], rtol=0.08 if kind == "int4" else 1e-6
    )
    assert dense.dtype_policy.name == before
