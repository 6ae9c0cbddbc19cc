"""What is built before a first step is built by the same methods."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tests.keras_internals.trainees import compiled_model
from tfamp import keras_internals


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


def test_a_model_is_built_with_its_optimizer_metrics_and_loss():
    model = compiled_model()
    spec = tf.TensorSpec((None, 3)), tf.TensorSpec((None, 2))
    keras_internals.build_everything(model, spec)
    assert model.built
    assert model.optimizer.built
    assert "mae" in model.get_metrics_result()
    assert keras_internals.loss_tracker(model) is model.metrics[0]
    assert {model, *model.layers} < set(keras_internals.all_layers(model))


def test_a_none_in_a_batch_is_no_obstacle_to_building():
    model = keras.Sequential([layers.ActivityRegularization(l2=1.0)])
    model.compile("adam")
    data = tf.data.Dataset.from_tensors(tf.ones((4, 3)))
    data = data.map(lambda x: (x, None))
    keras_internals.build_everything(model, data.element_spec)
    assert model.built


def test_a_model_without_call_is_left_as_it_is():
    model = keras.Model()
    model.compile("adam")
    keras_internals.build_everything(model, tf.TensorSpec((None, 3)))
    assert not model.built


def test_layers_and_optimizer_are_built_by_specs():
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile("adam", "mse", metrics=["mae"])
    spec = (tf.TensorSpec((None, 2)), tf.TensorSpec((None, 3)))
    keras_internals.build_layers(model, spec)
    assert model.layers[0].kernel.shape == (2, 3)
    keras_internals.build_optimizer(model)
    assert model.optimizer.built
    logs = keras_internals.logs_in_order(model, {"loss": 1.0})
    assert logs == 1.0
    assert not keras_internals.is_marked(model, "seen")
    keras_internals.mark(model, "seen")
    assert keras_internals.is_marked(model, "seen")
