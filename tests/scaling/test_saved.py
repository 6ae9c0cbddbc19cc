"""Saved and loaded, training goes on as if it had never stopped."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_slow

INNER = {
    "adamw": lambda: keras.optimizers.AdamW(
        0.05, use_ema=True, ema_overwrite_frequency=3, global_clipnorm=0.5
    ),
    "muon": lambda: keras.optimizers.Muon(0.05),
    "multi": lambda: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.Adam(0.05),
            {".*bias": keras.optimizers.SGD(0.1, momentum=0.9)},
        )
    ),
}


def build_model(inner="adamw", **options):
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, activation="relu"),
            keras.layers.Dense(2),
        ]
    )
    options = {"dynamic_growth_steps": 3, "hysteresis": 2} | options
    model.compile(
        tfamp.LossScaleOptimizer(INNER[inner](), **options), loss="mse"
    )
    return model


def batches(first, last):
    """Step 1 and 2 overflow: scale and counters move away from the start."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(8, 4, 4)).astype("float32")
    y = generator.normal(size=(8, 4, 2)).astype("float32")
    y[1:3] *= 1e4
    return tf.data.Dataset.from_tensor_slices((x[first:last], y[first:last]))


def train(model, first, last):
    tfamp.fit(model, batches(first, last), verbose=0, on_overflow="ignore")
    return model


def state(model):
    variables = model.weights + model.optimizer.variables
    return [variable.numpy() for variable in variables]


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def by_keras_file(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def by_checkpoint(model, folder):
    path = tf.train.Checkpoint(model=model).save(str(folder / "checkpoint"))
    keras.utils.set_random_seed(7)
    fresh = build_model(model.inner_name)
    fresh.optimizer.build(fresh.trainable_variables)
    tf.train.Checkpoint(model=fresh).restore(path).assert_consumed()
    return fresh


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "save_and_load"),
    mostly_slow(
        [
            ("adamw", by_keras_file),
            ("muon", by_keras_file),
            ("multi", by_keras_file),
            ("adamw", by_checkpoint),
            # tf.train.Checkpoint does not see into a MultiOptimizer of Keras.
            ("muon", by_checkpoint),
        ],
        always=[("multi", by_keras_file), ("adamw", by_checkpoint)],
    ),
)
def test_training_goes_on_bit_for_bit(inner, save_and_load, tmp_path):
    model = train(build_model(inner), 0, 5)
    model.inner_name = inner
    scale = float(model.optimizer.dynamic_scale.numpy())
    assert scale != model.optimizer.initial_scale
    assert int(model.optimizer.skipped_steps.numpy()) == 2
    loaded = save_and_load(model, tmp_path)
    assert_same_bits(state(loaded), state(model))
    assert loaded.optimizer.rule == model.optimizer.rule

    # Saved before fit made the averages the weights: not the same run.
    assert_same_bits(state(train(loaded, 5, 8)), state(train(model, 5, 8)))


@pytest.mark.slow
def test_another_process_loads_it(tmp_path):
    model = train(build_model(), 0, 5)
    model.save(tmp_path / "model.keras")
    code = f"""
import numpy as np
import tfamp
from tests.conftest import mostly_slow
model = tfamp.load_model({str(tmp_path / "model.keras")!r})
variables = model.weights + model.optimizer.variables
np.savez({str(tmp_path / "state.npz")!r}, *[v.numpy() for v in variables])
print(type(model.optimizer).__module__, model.optimizer.rule)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip() == f"tfamp.scaling.optimizer {model.optimizer.rule}"
    )
    with np.load(tmp_path / "state.npz") as loaded:
        assert_same_bits(list(loaded.values()), state(model))


@pytest.mark.slow
def test_state_of_a_dynamic_run_trains_on_at_a_fixed_scale(tmp_path):
    model = train(build_model(), 0, 5)
    model.save_weights(tmp_path / "model.weights.h5")
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    fixed = build_model(dynamic=False, initial_scale=2.0**4)
    fixed.optimizer.build(fixed.trainable_variables)
    tf.train.Checkpoint(model=fixed).restore(path).assert_consumed()
    assert float(fixed.optimizer.dynamic_scale.numpy()) != 2.0**4

    def weights_after_one_step(model):
        return [
            weight.numpy() for weight in train(model, 5, 6).trainable_variables
        ]

    for one, other in zip(
        weights_after_one_step(fixed),
        weights_after_one_step(model),
        strict=True,
    ):
        # The scales differ, and with them what float16 rounds.
        np.testing.assert_allclose(one, other, rtol=5e-3, atol=5e-3)
    assert float(fixed.optimizer.dynamic_scale.numpy()) == 2.0**4


@pytest.mark.parametrize("content", [None, "no zip file"])
def test_what_is_no_keras_file_is_refused_in_a_line(tmp_path, content):
    path = tmp_path / "model.keras"
    if content:
        path.write_text(content)
    with pytest.raises(tfamp.InputError, match="expected what"):
        tfamp.load_model(path)
