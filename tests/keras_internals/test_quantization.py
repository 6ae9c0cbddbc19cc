"""Kernels are quantized, and files hold what they must."""

import functools

import keras
import numpy as np
import pytest
from keras import layers
from packaging.version import Version

from tfamp import keras_internals


@pytest.mark.skipif(
    Version(keras.__version__) < Version("3.15"), reason="not tried with it"
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")
def test_gptq_fits_kernels_to_data_and_is_saved_whole(tmp_path):
    draw = np.random.default_rng(0)
    # Of two numbers a row: errors in what they do not move are free.
    x = (draw.normal(size=(64, 2)) @ draw.normal(size=(2, 16))).astype(
        "float32"
    )
    kernel = draw.normal(size=(16, 3)).astype("float32")
    # Of one sign, as a kernel may be.
    kernel[:, 0] = 2 + np.arange(16) / 16
    errors = {}
    for kind in ("int4", "gptq"):
        model = keras.Sequential(
            [keras.Input([16]), layers.Dense(3, use_bias=False)]
        )
        model.set_weights([kernel])
        if kind == "int4":
            keras_internals.quantize(model, kind, [])
        else:
            run = functools.partial(model, x)
            keras_internals.quantize_with_gptq(model, [], run)
        errors[kind] = np.abs(model(x) - x @ kernel).max()
    assert 0 < errors["gptq"] < 0.7 * errors["int4"]

    with keras_internals.saved_whole(model):
        model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:Layer .* does not have")
def test_what_a_file_would_load_as_it_was_quantized_is_known():
    @keras.saving.register_keras_serializable("test_keras_internals")
    class Making(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(2, name="dense")

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            return self.dense(x)

    inputs = keras.Input([3, 2])
    x = layers.MultiHeadAttention(1, 2)(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(2)(Making(name="making")(x)))
    keras_internals.quantize(model, "int8", [])
    lost = keras_internals.lost_at_saving(model)
    every = keras_internals.all_layers(model)
    assert [every[i].path for i in lost] == ["making/dense"]
    assert sum(each.quantization_mode == "int8" for each in every) == 6
