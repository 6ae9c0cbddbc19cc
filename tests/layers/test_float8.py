"""8-bit products against NumPy, ml_dtypes and the published recipe."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from packaging.version import Version

import tfamp
from tfamp.layers import float8_counterparts
from tfamp.layers.float8_numbers import (
    E4M3,
    E5M2,
    LARGEST,
    amax_of,
    quantize_dequantize,
    scale_of,
)
from tfamp.layers.float8_product import known_amax
from tfamp.scaling.backward import gradients_scaled_by

# Keras 3.15 copies its variables with np.array, of which NumPy 2 warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
MODES = {
    "eager": lambda f: f,
    "graph": tf.function,
    "xla": lambda f: tf.function(f, jit_compile=True),
}
# `doctor` says what it did before.
XLA_ROUNDS_ONCE = Version(tf.__version__) >= Version("2.21")
DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
}


def rounded(x, format_name, scale):
    """What NumPy makes of float32 numbers in 8 bits."""
    largest = LARGEST[format_name]
    clipped = np.clip(x * np.float32(scale), -largest, largest)
    quantized = clipped.astype(getattr(ml_dtypes, format_name))
    return quantized.astype("float32") * (np.float32(1) / np.float32(scale))


def values(count=2000):
    random = np.random.default_rng(0)
    sizes = np.exp(random.uniform(-14, 3, count))
    return (random.normal(size=count) * sizes).astype("float32")


@pytest.mark.parametrize(
    "mode", MODES if XLA_ROUNDS_ONCE else ["eager", "graph"]
)
@pytest.mark.parametrize("format_name", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_rounding_is_numpys_bit_for_bit(mode, format_name, dtype, power_of_two):
    # Zeros of both signs, and what becomes one.
    x = np.append(values(), np.float32([0, -0.0, 1e-9, -1e-9]))
    x = x.astype(DTYPES[dtype])
    amax = np.abs(x.astype("float32")).max()
    scale = np.float32(LARGEST[format_name]) / amax
    if power_of_two:
        scale = 2.0 ** np.floor(np.log2(np.float64(scale)))
    wanted = rounded(x.astype("float32"), format_name, scale).astype(x.dtype)

    def compute(x):
        scales = scale_of(amax_of(x), format_name, 0, power_of_two)
        # As a product does it.
        is_exact = power_of_two and dtype == "bfloat16"
        between = x.dtype if is_exact else tf.float32
        rounded = quantize_dequantize(x, *scales, format_name, between)
        return tf.cast(rounded, x.dtype)

    got = MODES[mode](compute)(tf.constant(x)).numpy()
    np.testing.assert_array_equal(got.view("uint8"), wanted.view("uint8"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("format_name", "most"), [(E4M3, 448), (E5M2, 57344)])
def test_finite_numbers_saturate_and_others_stay_other(mode, format_name, most):
    one = tf.constant(1.0)
    x = tf.constant([1e9, -1e9, 3.0, np.nan, np.inf])

    def compute(x):
        return quantize_dequantize(x, one, one, format_name, x.dtype)

    got = MODES[mode](compute)(x).numpy()
    np.testing.assert_array_equal(got[:3], [most, -most, 3])
    assert not np.isfinite(got[3:]).any()


@pytest.mark.parametrize(
    ("amax", "margin", "scale"),
    [
        (1.75, 0, 256.0),
        (np.nextafter(np.float32(1.75), np.float32(2)), 0, 128.0),
        (1.75, 3, 32.0),
        (448.0, 0, 1.0),
        (449.0, 0, 0.5),
        (3e38, 0, 2.0**-120),
        (0.0, 0, 1.0),
        (np.inf, 0, 1.0),
    ],
)
def test_scales_are_the_largest_powers_of_two_that_fit(amax, margin, scale):
    got = scale_of(tf.constant(amax, tf.float32), E4M3, margin, True)
    assert [float(each) for each in got] == [scale, 1 / scale]


def one_product(dtype="mixed_bfloat16", **settings):
    """A model of one product, and its layer."""
    layer = layers.Dense(4, use_bias=False, dtype=dtype)
    model = keras.Sequential([keras.Input((4,)), layer])
    tfamp.float8(model, skip="none", **settings)
    return model, layer


def step(layer, x, factor=1.0, loss_scale=None):
    """One step of histories alone; returns outputs and gradients."""
    optimizer = type("Scale", (), {"applied_scale": loss_scale})
    variables = layer.trainable_variables
    with tf.GradientTape() as tape:
        outputs = tf.cast(layer(tf.constant(x)), tf.float32)
        loss = tf.reduce_sum(outputs) * factor
        if loss_scale is not None:
            loss *= loss_scale
    with gradients_scaled_by(optimizer):
        gradients = tape.gradient(loss, [v.value for v in variables])
    for variable, gradient in zip(variables, gradients, strict=True):
        if float8_counterparts.is_history(variable):
            variable.assign(gradient)
    return outputs.numpy(), gradients[0].numpy()


def scale_used(layer, own):
    history = layer.float8_histories[0].value
    amax = float(known_amax(history)) or own
    return round(amax / 448, 4)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_delayed_scales_are_one_step_late(dtype):
    _, layer = one_product(dtype, history=4, power_of_two=False)
    used = []
    for amax in (2.0, 4.0, 8.0, 8.0, 8.0):
        x = np.zeros((2, 4), "float32")
        x[0, 0] = amax
        used.append(scale_used(layer, amax))
        step(layer, x)
    # The first is the tensor's own; where nothing is known, 1 would be lost.
    assert used == [0.0045, 0.0045, 0.0089, 0.0179, 0.0179]
    np.testing.assert_array_equal(
        layer.float8_histories[0].numpy(), [1, 8, 8, 8, 4]
    )


def test_what_a_delayed_scale_is_too_small_for_saturates():
    _, layer = one_product()
    layer.kernel.assign(np.eye(4))
    step(layer, np.full((1, 4), 1.75, "float32"))
    outputs, _ = step(layer, np.full((1, 4), 7.0, "float32"))
    np.testing.assert_array_equal(outputs, 1.75)
    outputs, _ = step(layer, np.full((1, 4), 7.0, "float32"))
    np.testing.assert_array_equal(outputs, 7.0)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_a_product_and_its_gradient_are_those_of_rounded_factors(
    scaling, power_of_two
):
    _, layer = one_product(scaling=scaling, power_of_two=power_of_two)
    x = values(8).reshape(2, 4).astype(ml_dtypes.bfloat16).astype("float32")
    kernel = layer.kernel.numpy()

    def in_8_bits(tensor):
        scale = np.float32(448) / np.abs(tensor).max()
        if power_of_two:
            scale = 2.0 ** np.floor(np.log2(scale))
        return rounded(tensor, E4M3, scale)

    outputs, gradient = step(layer, x)
    wanted = in_8_bits(x) @ in_8_bits(kernel)
    np.testing.assert_array_equal(
        outputs, wanted.astype(ml_dtypes.bfloat16).astype("float32")
    )
    np.testing.assert_allclose(
        gradient, in_8_bits(x).T @ np.ones((2, 4)), rtol=2**-8
    )


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_histories_hold_true_gradients_while_the_loss_scale_moves(dtype):
    _, layer = one_product(dtype, history=4)
    x = np.ones((2, 4), "float32")
    for loss_scale in (2.0**20, 2.0**21, 2.0**10):
        # Too small for float16 without a scale.
        _, gradient = step(layer, x, 2.0**-26, tf.constant(loss_scale))
        # None of it is lost to a scale that is one step late.
        np.testing.assert_array_equal(gradient, loss_scale * 2.0**-25)
    np.testing.assert_array_equal(
        layer.float8_histories[2].numpy(), [1, *[2.0**-26] * 3, 0]
    )


def test_a_layer_that_is_called_twice_takes_each_tensors_own_scale():
    _, layer = one_product()
    layer.kernel.assign(np.eye(4))
    variables = layer.trainable_variables
    for _ in range(3):
        with tf.GradientTape() as tape:
            small = layer(tf.fill((1, 4), 2.0**-20))
            large = layer(tf.fill((1, 4), 2.0**20))
            loss = tf.reduce_sum(tf.cast(small + large, tf.float32))
        np.testing.assert_array_equal(small, 2.0**-20)
        np.testing.assert_array_equal(large, 2.0**20)
        gradients = tape.gradient(loss, [v.value for v in variables])
        for variable, gradient in zip(variables, gradients, strict=True):
            if float8_counterparts.is_history(variable):
                variable.assign(gradient)
    history = layer.float8_histories[0].numpy()
    # Two products gave it: it does not grow, and is not used.
    assert history[0] == 2
    assert history[2:].sum() == 0


def test_no_training_flag_and_no_training_leave_a_scale_of_one():
    model, layer = one_product()
    layer.kernel.assign(np.eye(4))
    tiny = np.full((1, 4), 2.0**-20, "float32")
    for training in (None, False, True):
        got = model(tiny, training=training)
        np.testing.assert_array_equal(got, tiny)
    step(layer, tiny)
    assert layer.float8_histories[0].numpy()[1] == 2.0**-20


def einsum_dense():
    return layers.EinsumDense("abc,cde->abde", (3, 2, 4), bias_axes="e")


LAYERS = {
    "dense": ((3, 8), lambda: layers.Dense(4)),
    "dense_of_a_row": ((8,), lambda: layers.Dense(4, activation="tanh")),
    "einsum": ((3, 8), lambda: einsum_dense()),
    "causal": ((6, 8), lambda: layers.Conv1D(4, 3, padding="causal")),
    "conv": ((6, 6, 8), lambda: layers.Conv2D(4, 3, strides=2, groups=2)),
    "pointwise": ((5, 5, 8), lambda: layers.Conv2D(4, 1, strides=2)),
    "conv3d": ((3, 3, 3, 2), lambda: layers.Conv3D(4, 2, padding="same")),
}


def power_of_two_in_8_bits(tensor):
    scale = 2.0 ** np.floor(np.log2(np.float32(448) / np.abs(tensor).max()))
    return rounded(tensor, E4M3, scale)


@pytest.mark.parametrize("name", LAYERS)
def test_covered_layers_are_keras_layers_of_rounded_factors(name):
    shape, make = LAYERS[name]
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = make()
    model = keras.Sequential([keras.Input(shape), layer])
    tfamp.float8(model, skip="none")
    keras.config.set_dtype_policy("float32")
    plain = make()
    plain.build((None, *shape))
    kernel, bias = layer.get_weights()[:2]
    plain.set_weights([power_of_two_in_8_bits(kernel), bias])
    x = values(2 * np.prod(shape)).reshape(2, *shape)
    x = x.astype(ml_dtypes.bfloat16).astype("float32")

    def outputs_and_gradients(layer, x):
        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = tf.cast(layer(x), tf.float32)
            loss = tf.reduce_sum(outputs)
        sources = [x, layer.kernel.value]
        return [outputs, *tape.gradient(loss, sources)]

    got = outputs_and_gradients(layer, x)
    wanted = outputs_and_gradients(plain, power_of_two_in_8_bits(x))
    for one, other in zip(got, wanted, strict=True):
        most = np.abs(other).max()
        # Behind tanh the gradient is not 1, and is rounded to 2 bits.
        bits = 3 if name == "dense_of_a_row" and one is not got[0] else 7
        np.testing.assert_allclose(one, other, atol=most * 2.0**-bits)


def projections():
    inputs = keras.Input((4, 8))
    x = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = layers.Conv1D(4, 3, name="conv")(x)
    x = layers.EinsumDense("abc,cd->abd", (None, 4), name="einsum")(x)
    return keras.Model(inputs, layers.Dense(2, name="dense")(x))


COVERED = [
    "attention/query",
    "attention/key",
    "attention/value",
    "attention/attention_output",
    "conv",
    "einsum",
    "dense",
]


def test_first_and_last_are_skipped_and_layers_can_be_named():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = projections()
    found = tfamp.float8(model)
    assert [each.path for each in found] == COVERED[1:-1]
    assert not any(each.changed for each in tfamp.float8(model))
    found = tfamp.float8(model, skip="none")
    assert [each.path for each in found if each.changed] == [
        COVERED[0],
        "dense",
    ]
    found = tfamp.float8(projections(), ["attention/*", "dense"])
    assert [each.path for each in found] == [*COVERED[:4], "dense"]
    assert "repeat float8 after loading" in str(found[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scaling": "static"}, "scaling='static'; expected one of"),
        ({"history": 0}, "history=0; expected an integer of at least 1"),
        ({"margin": 0.5}, "margin=0.5; expected an integer"),
        ({"skip": "some"}, "skip='some'; expected one of"),
        ({"layers": "nowhere"}, "No layer of the model is or matches"),
    ],
)
def test_other_settings_are_refused_in_one_line(arguments, message):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(tfamp.InputError, match=message):
        tfamp.float8(model, **arguments)


def test_models_without_a_layer_for_it_are_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="a")])
    with pytest.raises(tfamp.InputError, match="must compute in bfloat16"):
        tfamp.float8(model, skip="none")
    with pytest.raises(tfamp.InputError, match="it computes in float32"):
        tfamp.float8(model, "a")
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.compile(keras.optimizers.SGD())
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(tfamp.InputError, match="compile with a new optimizer"):
        tfamp.float8(model, skip="none")


def test_a_keras_file_holds_the_layers_and_their_histories(tmp_path):
    model, layer = one_product(history=4, margin=1)
    step(layer, np.full((1, 4), 3.0, "float32"))
    model.save(tmp_path / "model.keras")
    loaded = tfamp.load_model(tmp_path / "model.keras")
    again = loaded.layers[0]
    assert type(again) is float8_counterparts.Dense
    assert again.float8_settings == layer.float8_settings
    for one, other in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
