"""What is measured in float32 is computed in float32."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

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
