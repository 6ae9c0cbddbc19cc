"""Each private detail of Keras that tfamp leans on still does what it did."""

import keras
import numpy as np
import pytest
from keras import layers

from tfamp import keras_internals


def test_sublayers_are_the_layers_a_layer_holds_itself():
    attention = layers.MultiHeadAttention(1, 2)
    attention.build((1, 3, 2), (1, 3, 2))
    wrapper = layers.TimeDistributed(attention)
    assert keras_internals.sublayers(wrapper) == [attention]
    names = {each.name for each in keras_internals.sublayers(attention)}
    assert {"query", "key", "value", "attention_output"} < names


def test_a_symbolic_run_sees_real_dtypes_and_changes_no_variable():
    layer = layers.BatchNormalization(dtype="mixed_float16")
    layer.build((None, 2))
    # A functional model repeats the dtype of the day it was built.
    layer.dtype_policy = "mixed_bfloat16"
    dtypes = []

    def run(x):
        dtypes.append(layer(x, training=True).dtype.name)

    before = layer.moving_mean.numpy()
    keras_internals.run_symbolically(run, keras.KerasTensor((4, 2)))
    assert dtypes == ["bfloat16"]
    np.testing.assert_array_equal(layer.moving_mean.numpy(), before)


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (layers.Attention, "_apply_scores"),
        (layers.AdditiveAttention, "_apply_scores"),
    ],
)
def test_attention_calls_the_method_that_float32_layers_override(cls, method):
    called = []

    def apply_scores(self, scores, value, scores_mask=None, training=False):
        called.append((scores.shape, value.shape, scores_mask, training))
        return value, scores

    overridden = type("Overridden", (cls,), {method: apply_scores})
    overridden()([np.zeros((1, 2, 4)), np.zeros((1, 2, 4))], training=True)
    assert called[-1] == ((1, 2, 2), (1, 2, 4), None, True)
