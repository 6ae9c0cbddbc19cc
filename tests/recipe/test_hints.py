"""What is known of a failure stands under its traceback."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfamp.recipe import hints

ROWS = np.arange(12.0, dtype="float32").reshape(4, 3)


def said(error, capsys):
    hints.add_hint(error)
    notes = getattr(error, "__notes__", [])
    assert bool(notes) or sys.version_info < (3, 11)
    return "\n".join(notes) + capsys.readouterr().err


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_a_normalization_that_cannot_be_adapted_is_explained(precision, capsys):
    keras.config.set_dtype_policy(precision)
    dataset = tf.data.Dataset.from_tensor_slices(ROWS).batch(2)
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        keras.layers.Normalization().adapt(dataset)
    assert 'Normalization(dtype="float32")' in said(caught.value, capsys)
    # And so it works.
    layer = keras.layers.Normalization(dtype="float32")
    layer.adapt(dataset)
    np.testing.assert_allclose(layer.mean[0], ROWS.mean(0), rtol=1e-6)


def test_another_error_is_left_alone(capsys):
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0  # noqa: B018
    hints.add_hint(caught.value)
    assert not getattr(caught.value, "__notes__", [])
    assert capsys.readouterr().err == ""
