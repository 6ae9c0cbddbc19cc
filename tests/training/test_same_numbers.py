"""fit computes the same numbers, however the work is split."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import FLOAT32_ROUNDING, mostly_long

STEPS = 20
BATCH = 16


def data(rows=STEPS * BATCH, drop_remainder=True):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, 6)).astype("float32")
    y = generator.integers(0, 4, rows)
    weight = generator.uniform(0.5, 2.0, rows).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, y, weight))
    return dataset.batch(BATCH, drop_remainder=drop_remainder)


def make_optimizer():
    # No Adam: it hides a factor on the gradients. Clipping acts on some of
    # the steps only, for it hides one as well.
    return keras.optimizers.SGD(
        0.1,
        momentum=0.9,
        global_clipnorm=2.0,
        weight_decay=0.01,
        use_ema=True,
        ema_overwrite_frequency=6,
    )


def train(strategy, dataset, **options):
    """Trains a small model; returns its weights and the history."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(16, activation="gelu"),
                keras.layers.LayerNormalization(),
                keras.layers.Dense(4, kernel_regularizer="l2"),
            ]
        )
        optimizer = make_optimizer()
        model.compile(
            tfamp.wrap_optimizer(optimizer, dynamic=True, initial_scale=256.0),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            weighted_metrics=["accuracy"],
            auto_scale_loss=False,
        )
    history = tfamp.fit(model, dataset, verbose=0, **options)
    assert int(model.optimizer.iterations.numpy()) == len(list(dataset))
    return model.get_weights(), history.history


@pytest.fixture(scope="module")
def expected(mirrored):
    return train(
        mirrored(1), data(), microbatches=1, jit=False, steps_per_loop=1
    )


def assert_same(actual, expected):
    (weights, history), (expected_weights, expected_history) = actual, expected
    for one, other in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32_ROUNDING)
    for name in ("loss", "accuracy", "weighted_accuracy"):
        np.testing.assert_allclose(
            history[name], expected_history[name], rtol=1e-5
        )


@pytest.mark.parametrize(
    ("replicas", "microbatches", "steps_per_loop", "jit"),
    mostly_long(
        [
            (replicas, *split)
            for replicas in (1, 2, 4)
            for split in (
                *[(1, 1, False), (1, 7, False), (2, 1, False), (4, 7, False)],
                *[(1, 7, True), (2, 1, True), (4, 7, True)],
            )
        ],
        # XLA compiles once per replica, which takes its time on a CPU.
        always=[(2, 2, 1, False)],
    ),
)
def test_weights_are_the_same_however_a_batch_is_split(
    mirrored, replicas, microbatches, steps_per_loop, jit, expected
):
    actual = train(
        mirrored(replicas),
        data(),
        microbatches=microbatches,
        jit=jit,
        steps_per_loop=steps_per_loop,
    )
    assert_same(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replicas", "microbatches", "last_rows"),
    mostly_long(
        itertools.product((1, 2, 4), (1, 2), (1, 3, 13)),
        always=[(2, 1, 3)],
    ),
)
def test_partial_last_batch_is_trained_on_whole(
    mirrored, replicas, microbatches, last_rows
):
    dataset = data(3 * BATCH + last_rows, drop_remainder=False)

    actual = train(mirrored(replicas), dataset, microbatches=microbatches)

    one_by_one = train(mirrored(1), dataset)
    assert_same(actual, one_by_one)


def test_fit_trains_as_keras_does_on_one_device(expected):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, activation="gelu"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(4, kernel_regularizer="l2"),
        ]
    )
    model.compile(
        make_optimizer(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        weighted_metrics=["accuracy"],
    )

    history = model.fit(data(), verbose=0, shuffle=False)

    assert_same((model.get_weights(), history.history), expected)
