"""A file of any precision, loaded in any precision."""

import json
import zipfile

import keras
import numpy as np
import pytest
from keras import ops

import tfamp
from tests.conftest import mostly_slow
from tfamp.precision.policy import PRECISIONS, precision_of

ROWS = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
LABELS = np.arange(16) % 3


def trained(precision):
    with tfamp.precision_scope(precision):
        model = keras.Sequential(
            [
                keras.Input([4]),
                keras.layers.Dense(8, "relu"),
                keras.layers.LayerNormalization(),
                keras.layers.Dense(3, "softmax"),
            ]
        )
        model.compile("adam", "sparse_categorical_crossentropy")
        tfamp.fit(model, ROWS, LABELS, batch_size=8, verbose=0)
    return model


@keras.saving.register_keras_serializable(package="tests")
class Angles(keras.layers.Layer):
    """Fails in 16 bits, and says so by its default."""

    def __init__(self, turns, dtype="float32", **kwargs):
        super().__init__(dtype=dtype, **kwargs)
        self.turns = turns

    def call(self, x):
        return ops.sin(x * self.turns * ops.ones([1], "float32"))

    def get_config(self):
        return super().get_config() | {"turns": self.turns}


@keras.saving.register_keras_serializable(package="tests")
class HoldsAngles(keras.layers.Layer):
    def __init__(self, angles=None, **kwargs):
        super().__init__(**kwargs)
        self.angles = Angles(2.0) if angles is None else angles

    def call(self, x):
        return self.angles(x)

    def get_config(self):
        angles = keras.saving.serialize_keras_object(self.angles)
        return super().get_config() | {"angles": angles}

    @classmethod
    def from_config(cls, config):
        angles = keras.saving.deserialize_keras_object(config.pop("angles"))
        return cls(angles, **config)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("made", [lambda: Angles(2.0), HoldsAngles])
def test_a_class_that_is_float32_stays_so_where_all_is(
    made, precision, tmp_path
):
    with tfamp.precision_scope("float32"):
        inputs = keras.Input([3])
        x = made()(keras.layers.Dense(4)(inputs))
        saved = keras.Model(inputs, keras.layers.Dense(4)(x))
    saved.save(tmp_path / "m.keras")
    model = tfamp.load_model(tmp_path / "m.keras", precision)
    layer = getattr(model.layers[2], "angles", model.layers[2])
    assert layer.compute_dtype == "float32"
    assert model.layers[1].compute_dtype == precision.removeprefix("mixed_")
    x = np.ones([2, 3], "float32")
    np.testing.assert_allclose(model(x), saved(x), atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "saved_in", mostly_slow(PRECISIONS, always=["mixed_bfloat16"])
)
def test_weights_moments_and_outputs_are_the_same(saved_in, tmp_path):
    model = trained(saved_in)
    model.save(tmp_path / "model.keras")
    reference = np.float64(model.predict_on_batch(ROWS))

    for precision in PRECISIONS:
        loaded = tfamp.load_model(tmp_path / "model.keras", precision)

        assert precision_of(loaded) == precision
        assert keras.config.dtype_policy().name == "float32"
        for before, after in zip(model.weights, loaded.weights, strict=True):
            assert after.dtype == "float32"
            np.testing.assert_array_equal(before, after)
        scaler = loaded.optimizer
        moments = getattr(scaler, "inner_optimizer", scaler).variables
        for before, after in zip(
            model.optimizer.inner_optimizer.variables, moments, strict=True
        ):
            np.testing.assert_array_equal(before, after)
        outputs = loaded(ROWS)
        assert outputs.dtype == "float32"
        np.testing.assert_allclose(outputs, reference, atol=0.03)
        expected = 1.0
        if precision == "mixed_float16":
            was = model.optimizer.dynamic_scale
            expected = was if saved_in == precision else 2.0**16
        steps = int(loaded.optimizer.iterations)
        if precision == "mixed_float16":
            assert scaler.dynamic
            assert float(scaler.dynamic_scale) == expected
        history = tfamp.fit(loaded, ROWS, LABELS, batch_size=8, verbose=0)
        (skipped,) = history.history["skipped_steps"]
        assert int(loaded.optimizer.iterations) == steps + 2 - skipped
        assert np.isfinite(history.history["loss"][0])


def test_float32_computes_as_a_model_built_in_it(tmp_path):
    model = trained("mixed_bfloat16")
    model.save(tmp_path / "model.keras")
    plain = keras.Sequential(
        [
            keras.Input([4]),
            keras.layers.Dense(8, "relu"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(3, "softmax"),
        ]
    )
    plain.set_weights(model.get_weights())

    loaded = tfamp.load_model(tmp_path / "model.keras", "float32")

    np.testing.assert_array_equal(loaded(ROWS), plain(ROWS))


def test_what_stands_beside_a_policy_is_loaded_in_another(tmp_path):
    with tfamp.precision_scope("mixed_bfloat16"):
        table = keras.layers.ReversibleEmbedding(7, 4, reverse_dtype="bfloat16")
        ids = keras.Input([3], dtype="int32")
        states = keras.ops.cast(table(ids) / 3, "bfloat16")
        logits = table(states, reverse=True)
        last = keras.layers.Activation("linear", dtype="float32")
        model = keras.Model(ids, last(logits))
    model.save(tmp_path / "model.keras")
    ids = np.arange(6).reshape(2, 3)

    loaded = tfamp.load_model(tmp_path / "model.keras", "float32")

    weights = np.float64(table.get_weights()[0])
    np.testing.assert_allclose(
        loaded(ids), weights[ids] / 3 @ weights.T, rtol=1e-5, atol=1e-9
    )
    other = tfamp.load_model(tmp_path / "model.keras", "mixed_float16")
    assert other.layers[1].reverse_dtype == "float16"


def test_a_layer_that_was_put_into_float32_stays_so(tmp_path):
    with tfamp.precision_scope("mixed_float16"):
        model = keras.Sequential(
            [
                keras.Input([4]),
                keras.layers.Dense(8),
                keras.layers.Dense(2, dtype="float32", name="head"),
            ]
        )
    model.save(tmp_path / "model.keras")

    loaded = tfamp.load_model(tmp_path / "model.keras", "mixed_bfloat16")

    assert loaded.layers[0].compute_dtype == "bfloat16"
    assert loaded.get_layer("head").compute_dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_frozen_weights_in_16_bits_keep_their_values(
    dtype, precision, tmp_path
):
    frozen = keras.layers.Dense(8, dtype=dtype, name="frozen")
    frozen.trainable = False
    with tfamp.precision_scope(f"mixed_{dtype}"):
        model = keras.Sequential(
            [keras.Input([4]), frozen, keras.layers.Dense(2)]
        )
    model.save(tmp_path / "model.keras")

    loaded = tfamp.load_model(tmp_path / "model.keras", precision)

    assert precision_of(loaded) == precision
    kernel = loaded.get_layer("frozen").kernel
    assert not loaded.get_layer("frozen").trainable
    is_same = precision == f"mixed_{dtype}"
    assert kernel.dtype == (dtype if is_same else "float32")
    expected = precision.removeprefix("mixed_")
    assert loaded.get_layer("frozen").compute_dtype == expected
    np.testing.assert_array_equal(
        np.float32(kernel.numpy()), np.float32(frozen.kernel.numpy())
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_all_in_16_bits_gets_weights_in_float32(dtype, tmp_path):
    model = keras.Sequential(
        [keras.Input([4]), keras.layers.Dense(2, dtype=dtype)]
    )
    model.save(tmp_path / "model.keras")

    loaded = tfamp.load_model(tmp_path / "model.keras", f"mixed_{dtype}")

    kernel = loaded.layers[0].kernel
    assert kernel.dtype == "float32"
    np.testing.assert_array_equal(
        kernel, np.float32(model.layers[0].kernel.numpy())
    )


@keras.saving.register_keras_serializable(package="test_precisions")
class TrainsItself(keras.Model):
    """Holds an optimizer that no `compile` was told of."""

    def __init__(self, network, own_optimizer, **options):
        super().__init__(**options)
        self.network = network
        self.own_optimizer = own_optimizer
        own_optimizer.build(network.trainable_variables)
        self.built = True

    def get_config(self):
        return {
            name: keras.saving.serialize_keras_object(getattr(self, name))
            for name in ("network", "own_optimizer")
        }

    @classmethod
    def from_config(cls, config):
        return cls(*map(keras.saving.deserialize_keras_object, config.values()))


@pytest.mark.parametrize("saved_in", ["float32", "mixed_float16"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_optimizer_that_a_model_holds_gets_the_scale(
    saved_in, precision, tmp_path
):
    with tfamp.precision_scope(saved_in):
        network = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
        model = TrainsItself(
            network, tfamp.wrap_optimizer(keras.optimizers.Adam())
        )
    model.save(tmp_path / "model.keras")

    loaded = tfamp.load_model(tmp_path / "model.keras", precision)

    scaler = loaded.own_optimizer
    assert scaler.dynamic == (precision == "mixed_float16")
    expected = 2.0**16 if precision == "mixed_float16" else 1.0
    assert float(scaler.dynamic_scale) == expected


def test_policies_by_path_are_renamed_too(tmp_path):
    policies = keras.dtype_policies.DTypePolicyMap(
        default_policy="mixed_float16"
    )
    policies["dense"] = keras.DTypePolicy("float32")
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(8)])
    model.save(tmp_path / "model.keras")
    file = tmp_path / "model.keras"
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(parts["config.json"])
    config["config"]["layers"][1]["config"]["dtype"] = (
        keras.saving.serialize_keras_object(policies)
    )
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)

    loaded = tfamp.load_model(file, "mixed_bfloat16")

    found = loaded.layers[0].dtype_policy
    assert found.default_policy.name == "mixed_bfloat16"
    assert found["dense"].name == "float32"


@pytest.mark.parametrize(
    ("dtype", "precision", "words"),
    [
        ("float64", "float32", "has layers in float64; only a model in"),
        ("float32", "mixed_float8", "Unknown precision 'mixed_float8'"),
        ("float32", "float8", "then call tfamp.float8"),
    ],
)
def test_what_cannot_be_is_refused(dtype, precision, words, tmp_path):
    model = keras.Sequential(
        [keras.Input([4]), keras.layers.Dense(1, dtype=dtype)]
    )
    model.save(tmp_path / "model.keras")
    with pytest.raises(tfamp.InputError, match=words):
        tfamp.load_model(tmp_path / "model.keras", precision)
