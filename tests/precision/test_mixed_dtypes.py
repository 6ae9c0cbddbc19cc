"""Layers whose own code mixes float32 and 16 bits, or rounds what it needs."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfamp
from tfamp.errors import InputError
from tfamp.precision.keep_float32 import keep_float32

X = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")


class SameShape(layers.Layer):
    """Keras need not call it to know what it returns."""

    inner = None

    def build(self, shape):
        if self.inner is not None:
            self.inner.build(shape)

    def compute_output_shape(self, shape):
        return shape


@keras.saving.register_keras_serializable(package="mixed")
class Routed(SameShape):
    """Weighs shares by a float32 mask, as routers of experts do."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(6)

    def call(self, x, training=False):
        shares = ops.softmax(self.inner(x))
        if training:
            mask = ops.cast(ops.ones_like(shares), "float32")
            self.add_loss(ops.sum(shares * mask))
        return shares


@keras.saving.register_keras_serializable(package="mixed")
class Residual(SameShape):
    """Gives its sublayer the dtype of its weights, which is float32."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(6, dtype=self.dtype)

    def call(self, x):
        return x + self.inner(x)


class Rotated(SameShape):
    """A product of a 16-bit input with a float32 matrix."""

    def call(self, x):
        return tf.einsum("bi,ij->bj", x, tf.linalg.diag(tf.ones(6)))


def model_of(layer):
    inputs = keras.Input((6,))
    x = layer(layers.Dense(6)(inputs))
    return keras.Model(inputs, layers.Dense(3, name="scores")(x))


@pytest.fixture(params=["mixed_bfloat16", "mixed_float16"])
def precision(request):
    return request.param


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("cls", [Routed, Residual, Rotated])
def test_what_stock_keras_cannot_call_can_be_called(precision, cls, outputs):
    reference = model_of(cls())
    keras.config.set_dtype_policy(precision)
    model = model_of(cls())
    model.set_weights(reference.get_weights())
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected to be"):
        model(X, training=True)
    kept = [each.path for each in keep_float32(model, outputs=outputs)]
    assert model.layers[2].name in kept
    assert ("scores" in kept) == outputs
    result = ops.cast(model(X, training=True), "float32")
    expected = reference(X, training=True)
    scale = 0.01 * np.abs(expected).max()
    np.testing.assert_allclose(result, expected, rtol=0.02, atol=scale)


@pytest.mark.parametrize("cls", [Routed, Residual])
def test_a_file_of_it_can_be_called(precision, cls, tmp_path):
    keras.config.set_dtype_policy(precision)
    model = model_of(cls())
    keep_float32(model)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(X, training=True), model(X))


@pytest.mark.slow
def test_fit_trains_what_stock_keras_cannot(precision):
    keras.config.set_dtype_policy(precision)
    model = model_of(Routed())
    model.compile("sgd", "mse")
    history = tfamp.fit(model, X, X[:, :3], batch_size=4, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert model.get_layer("scores").compute_dtype == "float32"


class Sized(SameShape):
    """Cannot be called on inputs of unknown size."""

    def call(self, x):
        x = ops.exp(x)
        return tf.concat([x[i : i + 1] for i in range(x.shape[0])], 0)


def test_what_needs_a_batch_is_named_with_the_cause(precision):
    keras.config.set_dtype_policy(precision)
    model = model_of(Sized())
    with pytest.raises(InputError, match=r"in Sized\.call\(\), TypeError: 'No"):
        keep_float32(model)
    assert "scores" in [each.path for each in keep_float32(model, batch=X)]


@pytest.mark.slow
def test_fit_knows_the_sizes_of_its_data(capsys):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = model_of(Sized())
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensors((X, X[:, :3]))
    tfamp.fit(model, data, epochs=1, verbose=2)
    kept = f"{model.layers[2].name}, scores in float32"
    assert kept in capsys.readouterr().out
    assert model.get_layer("scores").compute_dtype == "float32"


class Angles(layers.Layer):
    """Casts its input to float32 itself; Keras has rounded it before."""

    def call(self, x):
        x = ops.cast(ops.expand_dims(x, -1), "float32")
        frequencies = ops.exp(-ops.arange(4, dtype="float32"))
        return ops.cast(ops.sin(x * frequencies), self.compute_dtype)


class Promoted(Angles):
    """Multiplies it by numbers in float32, to which Keras takes it."""

    def call(self, x):
        frequencies = np.exp(-np.arange(4)).astype("float32")
        angles = ops.multiply(x[..., None], frequencies)
        return ops.cast(ops.sin(angles), self.compute_dtype)


class Positions(SameShape):
    """Numbers rows in 16 bits, where 257 is 256."""

    def call(self, x):
        rows = ops.arange(ops.shape(x)[1], dtype=x.dtype)
        return x - rows


@pytest.mark.parametrize("cls", [Angles, Promoted])
def test_inputs_that_code_has_in_float32_come_unrounded(precision, cls):
    times = np.array([[777.3, 300.7]], "float32")
    keras.config.set_dtype_policy(precision)
    inputs = keras.Input((2,))
    model = keras.Model(inputs, cls(name="angles")(inputs))
    expected = np.sin(times[..., None] * np.exp(-np.arange(4)))
    assert np.abs(ops.cast(model(times), "float32") - expected).max() > 0.05
    kept = keep_float32(model, outputs=False)
    assert [each.path for each in kept] == ["angles"]
    rounded = ops.cast(model(times), "float32")
    np.testing.assert_allclose(rounded, expected, atol=0.004)


@pytest.mark.parametrize("cls", [Angles, Promoted])
def test_casting_what_another_layer_computed_changes_nothing(precision, cls):
    keras.config.set_dtype_policy(precision)
    inputs = keras.Input((2,))
    model = keras.Model(inputs, cls()(layers.Dense(2)(inputs)))
    assert keep_float32(model, outputs=False) == []


class Around(SameShape):
    """Hands to a layer inside what is float32 because of us alone."""

    def __init__(self):
        super().__init__()
        self.angles = Angles()

    def call(self, x):
        return ops.mean(self.angles(ops.softmax(x)), -1)


def test_of_layers_inside_a_kept_one_those_are_kept_that_round(precision):
    keras.config.set_dtype_policy(precision)
    inputs = keras.Input((2,))
    around = Around()
    model = keras.Model(inputs, around(layers.Dense(2)(inputs)))
    kept = [each.path for each in keep_float32(model, outputs=False)]
    assert kept == [around.name]


def test_positions_are_counted_in_float32(precision):
    length = 4096
    keras.config.set_dtype_policy(precision)
    inputs = keras.Input((length,))
    model = keras.Model(inputs, Positions(name="positions")(inputs))
    places = np.arange(length, dtype="float32")[None]
    assert np.abs(ops.cast(model(places + 1), "float32") - 1).max() > 0
    kept = keep_float32(model, outputs=False)
    assert [each.path for each in kept] == ["positions"]
    np.testing.assert_array_equal(model(places + 1), np.ones((1, length)))
