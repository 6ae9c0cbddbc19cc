import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp

X = np.arange(22, dtype="float32")[:, None]


def two_outputs():
    """Its first output is its input, its second twice that."""
    x = keras.Input((1,))
    double = keras.layers.Dense(1, kernel_initializer="ones", use_bias=False)(
        keras.layers.Add()([x, x])
    )
    return keras.Model(x, {"same": x, "double": double})


@pytest.mark.parametrize("replicas", [2, 4])
def test_rows_come_in_order_each_once_on_any_number_of_replicas(
    replicas, mirrored
):
    with mirrored(replicas).scope():
        model = two_outputs()
    # Batches of 5: none is divided by the replicas, the last has 2 rows.
    outputs = tfamp.predict(model, X, batch_size=5)
    np.testing.assert_array_equal(outputs["same"], X)
    np.testing.assert_array_equal(outputs["double"], 2 * X)


def test_outputs_are_float32_whatever_the_model_computes_in():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    assert model(X[:2]).dtype == "bfloat16"
    assert tfamp.predict(model, X).dtype == "float32"


def test_inputs_in_a_list_stay_inputs():
    a, b = keras.Input((1,)), keras.Input((1,))
    model = keras.Model([a, b], keras.layers.Subtract()([a, b]))
    outputs = tfamp.predict(model, [3 * X, X], batch_size=8)
    np.testing.assert_array_equal(outputs, 2 * X)


def test_callbacks_see_each_batch_and_steps_end_it():
    seen = []
    callback = keras.callbacks.LambdaCallback()
    callback.on_predict_batch_end = lambda batch, logs: seen.append(
        # Keras hands on a dictionary of outputs as the logs themselves.
        (batch, len(logs["same"]))
    )
    data = tf.data.Dataset.from_tensor_slices(X).batch(8).repeat()
    outputs = tfamp.predict(two_outputs(), data, steps=4, callbacks=callback)
    assert seen == [(0, 8), (1, 8), (2, 6), (3, 8)]
    assert len(outputs["same"]) == 30
    with pytest.raises(tfamp.InputError, match="pass steps"):
        tfamp.predict(two_outputs(), data)
