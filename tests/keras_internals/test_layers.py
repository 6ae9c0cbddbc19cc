"""What layers hold, and what they keep of a call, is where it was."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tfamp import keras_internals


def test_sublayers_are_the_layers_a_layer_holds_itself():
    attention = layers.MultiHeadAttention(1, 2)
    attention.build((1, 3, 2), (1, 3, 2))
    wrapper = layers.TimeDistributed(attention)
    assert keras_internals.sublayers(wrapper) == [attention]
    names = {each.name for each in keras_internals.sublayers(attention)}
    assert {"query", "key", "value", "attention_output"} < names


def test_variables_that_float8_overwrites_are_known():
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = layers.Dense(2)
    layer.build((None, 2))
    layer.quantize("float8")
    overwritten = [
        keras_internals.overwrites_with_gradient(variable)
        for variable in layer.trainable_variables
    ]
    assert sorted(overwritten) == [False] * 2 + [True] * 6


def test_state_is_added_to_a_layer_that_is_built():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, name="a")])
    state = keras_internals.add_state(model.layers[0], "state", (3,))
    assert state.path == f"{model.layers[0].path}/state"
    assert keras_internals.overwrites_with_gradient(state)
    assert any(each is state for each in model.trainable_variables)
    np.testing.assert_array_equal(state.numpy(), np.zeros(3))
    with pytest.raises(ValueError, match="cannot add new elements"):
        model.layers[0].add_weight(name="other", shape=(1,))


def test_masks_move_from_one_tensor_to_another():
    mask = tf.constant([True, False])
    marked, plain = tf.ones((2, 1)), tf.ones((2, 1))
    assert keras_internals.mask_of(plain) is None
    keras_internals.attach_mask(plain, None)
    assert keras_internals.mask_of(plain) is None
    keras_internals.attach_mask(marked, mask)
    assert keras_internals.mask_of(marked) is mask
    # Keras looks for it in the same place.
    loss = keras.losses.MeanAbsoluteError()
    assert float(loss(tf.constant([[1.0], [9.0]]), marked)) == 0.0


def test_additional_losses_are_kept_as_they_were():
    layer = layers.Dense(2, activity_regularizer="l2")
    layer(np.ones((1, 2)))
    before = [float(loss) for loss in layer.losses]
    with keras_internals.additional_losses_kept([layer]):
        layer(np.full((1, 2), 3.0))
        assert [float(loss) for loss in layer.losses] != before
    assert [float(loss) for loss in layer.losses] == before


def test_renormalizing_batch_norm_is_told_from_any_other():
    assert not keras_internals.renormalizes(layers.BatchNormalization())
    if hasattr(layers.BatchNormalization(), "renorm"):
        layer = layers.BatchNormalization(renorm=True)
        assert keras_internals.renormalizes(layer)


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
