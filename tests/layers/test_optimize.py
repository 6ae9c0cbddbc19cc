"""tfamp.optimize: what it replaces, what it leaves, and that models last."""

import inspect
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import first_always
from tfamp import keras_internals
from tfamp.layers import batch_norm, norms, pointwise_convolution

# Keras 3.15 copies its variables with np.array, of which NumPy 2 warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

BATCH = np.linspace(-2, 2, 2 * 4 * 4 * 3, dtype="float32").reshape(2, 4, 4, 3)
FASTER = {
    "conv": pointwise_convolution.Conv2D,
    "batch_norm": batch_norm.BatchNormalization,
    "layer_norm": norms.LayerNormalization,
    "rms_norm": norms.RMSNormalization,
}


def network():
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(4, 1, name="conv")(inputs)
    x = layers.BatchNormalization(name="batch_norm")(x)
    x = layers.Conv2D(4, 3, activation="relu", name="conv_3x3")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.LayerNormalization(name="layer_norm")(x)
    x = layers.RMSNormalization(name="rms_norm")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="net")


def kinds(model):
    return {
        layer.name: type(layer)
        for layer in model.layers
        if layer.name in FASTER
    }


def summary(model):
    lines = []
    model.summary(print_fn=lines.append)
    return "\n".join(lines)


def test_layers_are_replaced_in_place_and_listed_once_as_new():
    model = network()
    before = list(model.layers)
    variables = list(model.variables)
    described = summary(model), [w.path for w in model.weights]
    configs = [layer.get_config() for layer in before]
    first = tfamp.optimize(model)
    assert [(each.path, each.changed) for each in first] == [
        (name, True) for name in FASTER
    ]
    assert "1x1 convolution" in str(first[0])
    assert kinds(model) == FASTER
    again = tfamp.optimize(model)
    assert [each.changed for each in again] == [False] * 4
    assert [str(each) for each in again] == [str(each) for each in first]
    # And nothing else is different.
    assert all(a is b for a, b in zip(before, model.layers, strict=True))
    assert all(a is b for a, b in zip(variables, model.variables, strict=True))
    assert (summary(model), [w.path for w in model.weights]) == described
    assert [layer.get_config() for layer in model.layers] == configs


class Doubled(layers.LayerNormalization):
    def call(self, inputs):
        return 2 * super().call(inputs)


UNEQUAL = {
    "a subclass": lambda: Doubled(),
    "batch norm over rows": lambda: layers.BatchNormalization(axis=1),
    "synchronized": lambda: layers.BatchNormalization(synchronized=True),
    **(
        {"renorm": lambda: layers.BatchNormalization(renorm=True)}
        if "renorm" in inspect.signature(layers.BatchNormalization).parameters
        else {}
    ),
    "layer norm over images": lambda: layers.LayerNormalization(axis=(1, 2, 3)),
    "rms norm over rows": lambda: layers.RMSNormalization(axis=1),
    "3x3": lambda: layers.Conv2D(3, 3),
    "1x3": lambda: layers.Conv2D(3, (1, 3)),
    "groups": lambda: layers.Conv2D(3, 1, groups=3),
    "depthwise": lambda: layers.DepthwiseConv2D(1),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_what_has_no_faster_equal_is_left_alone(name):
    layer = UNEQUAL[name]()
    model = keras.Sequential([keras.Input((4, 4, 3)), layer])
    cls = type(layer)
    assert tfamp.optimize(model) == []
    assert type(layer) is cls


def test_low_rank_weights_and_other_ranks_are_left_alone():
    rows = layers.BatchNormalization()
    low_rank = layers.Conv2D(3, 1, lora_rank=1)
    model = keras.Sequential(
        [keras.Input((2, 2, 3)), low_rank, layers.Flatten(), rows]
    )
    assert tfamp.optimize(model) == []


def test_channels_first_is_left_alone():
    model = keras.Sequential(
        [
            keras.Input((3, 4, 4)),
            layers.Conv2D(3, 1, data_format="channels_first"),
        ]
    )
    assert tfamp.optimize(model) == []


class Outer(keras.Model):
    def __init__(self):
        super().__init__(name="outer")
        self.norm = layers.LayerNormalization(name="norm")
        self.inner = network()

    def call(self, x):
        return self.inner(self.norm(x))


def test_layers_are_found_at_any_depth_and_unsaved_ones_are_told_so():
    model = Outer()
    model(BATCH)
    found = {each.path: each.reason for each in tfamp.optimize(model)}
    assert list(found) == ["norm", *(f"net/{name}" for name in FASTER)]
    assert all(
        reason.endswith("; not saved, repeat optimize after loading")
        for reason in found.values()
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (layers.Dense(1), "Expected a keras.Model, got Dense"),
        (keras.Sequential([layers.Dense(1)], name="s"), "'s' is not built"),
    ],
)
def test_what_is_no_built_model_is_refused(value, message):
    with pytest.raises(tfamp.InputError, match=message):
        tfamp.optimize(value)


@pytest.mark.parametrize("compiled_before", first_always([True, False], 1))
def test_a_compiled_model_trains_with_the_faster_layers(
    compiled_before, monkeypatch
):
    traced = []
    normalize = batch_norm.BatchNormalization._normalize

    def noted(self, *args):
        traced.append(self.name)
        return normalize(self, *args)

    monkeypatch.setattr(batch_norm.BatchNormalization, "_normalize", noted)
    model = network()
    if compiled_before:
        model.compile("sgd", loss="mse", jit_compile=False)
        model.fit(BATCH, np.zeros((2, 3)), verbose=0)
        tfamp.optimize(model)
        assert model.train_function is None
    else:
        tfamp.optimize(model)
        model.compile("sgd", loss="mse", jit_compile=False)
    # Called twice on placeholders, to know that it still can be.
    assert traced == ["batch_norm"] * 2
    traced.clear()
    model.fit(BATCH, np.zeros((2, 3)), verbose=0)
    assert traced


@pytest.mark.slow
@pytest.mark.parametrize("order", first_always(["before", "after"], 1))
def test_it_works_with_keep_float32_in_either_order(order, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    stock, model = network(), network()
    model.set_weights(stock.get_weights())
    kept = [str(each) for each in tfamp.keep_float32(stock)]
    if order == "before":
        tfamp.keep_float32(model)
    assert len(tfamp.optimize(model)) == 4
    if order == "after":
        assert [str(each) for each in tfamp.keep_float32(model)] == kept
    assert kinds(model) == FASTER
    outputs = model(BATCH)
    assert outputs.dtype == tf.float32
    np.testing.assert_allclose(outputs, stock(BATCH), atol=0.03)
    model.save(tmp_path / "model.keras")
    loaded = tfamp.load_model(tmp_path / "model.keras")
    assert kinds(loaded) == FASTER
    np.testing.assert_array_equal(loaded(BATCH), outputs)


def test_a_norm_chosen_to_be_float32_returns_float32():
    keras.config.set_dtype_policy("mixed_float16")
    model = network()
    tfamp.optimize(model)
    tfamp.keep_float32(model, layers=["batch_norm", "layer_norm", "rms_norm"])
    x = tf.constant(60000.0, tf.float16, (2, 2, 2, 4))
    for name in ("batch_norm", "layer_norm", "rms_norm"):
        assert model.get_layer(name)(x).dtype == tf.float32


def test_weights_and_checkpoints_fit_the_model_as_it_was(tmp_path):
    optimized, plain = network(), network()
    tfamp.optimize(optimized)
    for source, target in ((optimized, plain), (plain, optimized)):
        for weight in source.weights:
            weight.assign(np.random.uniform(0.5, 1, weight.shape))
        source.save_weights(tmp_path / "of.weights.h5")
        target.load_weights(tmp_path / "of.weights.h5")
        for one, other in zip(source.weights, target.weights, strict=True):
            np.testing.assert_array_equal(one, other)
            other.assign(tf.zeros_like(other))
        path = tf.train.Checkpoint(model=source).write(str(tmp_path / "ckpt"))
        status = tf.train.Checkpoint(model=target).read(path)
        status.assert_consumed()
        for one, other in zip(source.weights, target.weights, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_file_is_loaded_where_nothing_of_tfamp_is_imported(tmp_path):
    model = network()
    tfamp.optimize(model)
    model.save(tmp_path / "model.keras")
    script = (
        "import sys, tfamp; model = tfamp.load_model(sys.argv[1]); "
        "print([each.changed for each in tfamp.optimize(model)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.keras"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.strip() == "[False, False, False, False]"


def test_a_copy_of_an_optimized_model_is_optimized():
    model = network()
    tfamp.optimize(model)
    assert kinds(keras.models.clone_model(model)) == FASTER


@pytest.mark.skipif(
    not keras_internals.RMS_NORMALIZATION_IS_FLOAT32,
    reason="what is found in the plain norm, the faster one mends",
)
def test_lint_finds_in_an_optimized_model_what_it_finds_in_the_plain_one():
    keras.config.set_dtype_policy("mixed_float16")

    def findings(model):
        return [(each.rule, each.layer) for each in tfamp.lint(model)]

    plain, optimized = network(), network()
    tfamp.optimize(optimized)
    found = findings(plain)
    assert found
    assert findings(optimized) == found


def test_probe_sees_the_layers_of_an_optimized_model():
    model = network()
    tfamp.optimize(model)
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    batches = tf.data.Dataset.from_tensors((BATCH, np.array([0, 1])))
    report = tfamp.probe(model, batches.repeat(), steps=2)
    seen = {
        (each.layer, each.kind)
        for each in report.tensors
        if each.layer in FASTER
    }
    for name in FASTER:
        for kind in ("activation", "activation_gradient", "gradient"):
            assert (name, kind) in seen


def test_a_model_that_can_no_longer_be_called_is_put_back(monkeypatch):
    def broken(self, inputs):
        raise TypeError("mixed dtypes")

    inputs = keras.Input((4,))
    norm = layers.RMSNormalization(name="norm")
    model = keras.Model(inputs, layers.Dense(2)(norm(inputs)))
    monkeypatch.setattr(norms.RMSNormalization, "call", broken)
    with pytest.raises(
        tfamp.InputError, match=r"'norm' cannot.*mixed.*as it was"
    ):
        tfamp.optimize(model)
    assert type(norm) is layers.RMSNormalization
    model(np.zeros((1, 4), "float32"))
