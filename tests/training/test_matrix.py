"""fit in every combination of what can be chosen: small, fast, all of them.

Two workers, the third strategy of the matrix, are in `test_multi_worker`.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import FLOAT32_ROUNDING, mostly_long

ROWS, BATCH = 48, 8
STEPS = ROWS // BATCH

# Of weights around 1 after these steps, in which the weights move by up to
# 0.4. Each gradient is rounded to the format, so a weight is off by a few of
# its spacings (float16 2**-11, bfloat16 2**-8) times what it moved.
TOLERANCE = {
    "float32": FLOAT32_ROUNDING,
    "mixed_float16": {"rtol": 0, "atol": 5e-4},
    "mixed_bfloat16": {"rtol": 0, "atol": 5e-3},
}

# precision, jit, microbatches, steps_per_loop
COMBINATIONS = list(itertools.product(TOLERANCE, [False, True], [1, 2], [1, 3]))


def train(strategy, precision, jit, microbatches, steps_per_loop):
    """Trains a small model; returns its weights and what was counted."""
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((ROWS, 4)).astype("float32")
    y = (x @ generator.standard_normal((4, 3))).argmax(axis=-1)
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    with tfamp.precision_scope(precision), strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(8, activation="relu"),
                keras.layers.Dense(3, dtype="float32"),
            ]
        )
        # No Adam: it hides a factor on the gradients.
        model.compile(
            tfamp.wrap_optimizer(keras.optimizers.SGD(0.2, momentum=0.5)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            auto_scale_loss=False,
        )
    history = tfamp.fit(
        model,
        dataset.batch(BATCH, drop_remainder=True),
        jit=jit,
        microbatches=microbatches,
        steps_per_loop=steps_per_loop,
        verbose=0,
    ).history
    optimizer = model.optimizer
    return {
        **{f"weight{i}": w for i, w in enumerate(model.get_weights())},
        "loss": np.array(history["loss"]),
        "accuracy": np.array(history["accuracy"]),
        "iterations": optimizer.iterations.numpy(),
        "skipped_steps": optimizer.skipped_steps.numpy(),
        "dynamic_scale": optimizer.dynamic_scale.numpy(),
    }


def check(results, precision):
    """Compares a training with that of float32 on one device."""
    expected = reference()
    assert results["iterations"] == STEPS
    assert results["skipped_steps"] == 0
    is_float16 = precision == "mixed_float16"
    assert results["dynamic_scale"] == (2.0**16 if is_float16 else 1.0)
    for name, value in results.items():
        assert np.isfinite(value).all(), name
        if name.startswith(("weight", "loss")):
            np.testing.assert_allclose(
                value, expected[name], **TOLERANCE[precision], err_msg=name
            )


@functools.cache
def reference():
    """float32 on one device, nothing split, nothing compiled."""
    strategy = tfamp.get_strategy("one_device")
    return train(strategy, "float32", False, 1, 1)


@pytest.mark.parametrize(
    ("num_devices", "precision", "jit", "microbatches", "steps_per_loop"),
    mostly_long(
        [(n, *each) for n in (1, 2) for each in COMBINATIONS],
        # Each choice is made once.
        always=[
            (1, "float32", True, 1, 3),
            (1, "mixed_bfloat16", False, 2, 1),
            (2, "mixed_float16", True, 2, 1),
        ],
    ),
)
def test_every_combination_trains_as_float32_on_one_device(
    mirrored,
    num_devices,
    precision,
    jit,
    microbatches,
    steps_per_loop,
):
    strategy = (
        tfamp.get_strategy("one_device") if num_devices == 1 else mirrored(2)
    )

    results = train(strategy, precision, jit, microbatches, steps_per_loop)

    check(results, precision)


def test_the_tolerances_are_far_below_what_training_moves():
    keras.utils.set_random_seed(0)
    kernel = keras.initializers.GlorotUniform()((4, 8)).numpy()
    moved = np.abs(reference()["weight0"] - kernel).max()
    for tolerance in TOLERANCE.values():
        assert moved > 20 * tolerance["atol"]
