"""Files of what fit trained, in a process that has no tfamp."""

import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest

import tfamp
from tfamp.files import saved_models

X = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
Y = X[:, :1]


def compiled(optimizer="adam", **options):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", **options)
    return model


def trained(*arguments):
    model = compiled(*arguments)
    tfamp.fit(model, X, Y, verbose=0)
    return model


def state(optimizer):
    """Of the optimizer that is inside, if one is."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return [variable.numpy() for variable in inner.variables]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def said(warnings_of_absl, monkeypatch):
    monkeypatch.setattr(saved_models, "_is_said", False)
    return warnings_of_absl


def test_a_plain_model_is_saved_as_it_was_compiled(tmp_path, said):
    model = trained()
    path = tmp_path / "model.keras"
    model.save(path)
    with zipfile.ZipFile(path) as file:
        assert b"tfamp" not in file.read("config.json")
    loaded = keras.models.load_model(path)
    assert type(loaded.optimizer) is keras.optimizers.Adam
    assert_same(state(loaded.optimizer), state(model.optimizer))
    assert not said
    # Both go on alike, wrapped anew.
    for each in (model, loaded):
        tfamp.fit(each, X, Y, shuffle=False, verbose=0)
    assert_same(model.get_weights(), loaded.get_weights())


@pytest.mark.slow
def test_it_loads_where_tfamp_is_not(tmp_path):
    model = trained()
    model.save(tmp_path / "model.keras")
    program = f"""
import sys
sys.modules["tfamp"] = None
import keras
model = keras.models.load_model({str(tmp_path / "model.keras")!r})
print(int(model.optimizer.iterations))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.stdout == "1\n", done.stderr


def test_weights_files_have_the_optimizers_state_for_both(tmp_path):
    ours, stock = trained(), compiled()
    stock.fit(X, Y, verbose=0)
    path = tmp_path / "model.weights.h5"
    for source, target in ((ours, stock), (stock, trained())):
        source.save_weights(path)
        target.load_weights(path)
        assert_same(state(target.optimizer), state(source.optimizer))
    wrapped = trained(tfamp.wrap_optimizer("adam"))
    wrapped.load_weights(path)
    assert_same(state(wrapped.optimizer), state(stock.optimizer))


def test_what_keras_s_own_scaler_saved_is_taken(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    stock = compiled()
    stock.fit(X, Y, verbose=0)
    stock.optimizer.dynamic_scale.assign(2.0**9)
    stock.save(tmp_path / "model.keras")
    loaded = tfamp.load_model(tmp_path / "model.keras", "mixed_float16")
    assert type(loaded.optimizer) is tfamp.LossScaleOptimizer
    assert_same(state(loaded.optimizer), state(stock.optimizer))
    assert float(loaded.optimizer.dynamic_scale) == 2.0**9
    history = tfamp.fit(stock, X, Y, verbose=0).history
    assert history["loss_scale"] == [2.0**9]


def test_saving_classes_of_tfamp_says_once_how_to_load_them(tmp_path, said):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential(
        [keras.Input([3]), keras.layers.Dense(2, activation="softmax")]
    )
    tfamp.keep_float32(model)
    for name in ("one", "two"):
        model.save(tmp_path / f"{name}.keras")
    (line,) = said
    assert "load it with tfamp.load_model(path)" in line


@pytest.mark.parametrize("inner", ["adam", "sgd with 7 weights"])
def test_one_that_never_stepped_loads_without_a_word(inner, tmp_path):
    """Seven weights have as many moments and numbers as a wrapper alone."""
    optimizer = keras.optimizers.Adam()
    layers = [keras.layers.Dense(1)]
    if inner != "adam":
        optimizer = keras.optimizers.SGD(momentum=0.9)
        layers = [keras.layers.Dense(2) for _ in range(3)]
        layers.append(keras.layers.Dense(1, use_bias=False))
    model = keras.Sequential([keras.Input([3]), *layers])
    model.compile(tfamp.wrap_optimizer(optimizer, initial_scale=2.0**9), "mse")
    model.optimizer.skipped_steps.assign(3)
    model.save(tmp_path / "model.keras")
    loaded = tfamp.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.skipped_steps) == 3
    assert_same(loaded.get_weights(), model.get_weights())
    tfamp.fit(loaded, X, Y, verbose=0)
    assert int(loaded.optimizer.iterations) == 1


def test_loading_says_nothing_of_saving(tmp_path, said):
    model = trained(tfamp.wrap_optimizer("adam"))
    model.save(tmp_path / "model.keras")
    assert len(said) == 1
    saved_models._is_said = False
    tfamp.load_model(tmp_path / "model.keras")
    assert len(said) == 1
