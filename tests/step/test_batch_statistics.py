"""Batch normalization's averages do not know of microbatches."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long

MOMENTUM = 0.9
# Far from 0: the variance is small against the mean.
ROWS = (np.random.default_rng(0).normal(size=(11, 4, 4, 2)) + 50).astype("f4")


def train(microbatches, strategy=None, optimized=False, rows=ROWS, **options):
    """The averages after one step on all rows."""
    with (strategy or tf.distribute.get_strategy()).scope():
        model = keras.Sequential(
            [
                keras.Input(rows.shape[1:]),
                keras.layers.BatchNormalization(momentum=MOMENTUM),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        if optimized:
            tfamp.optimize(model)
        optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD(0.0))
        model.compile(optimizer, "mse", auto_scale_loss=False)
    targets = np.zeros((len(rows), 1), "float32")
    tfamp.fit(
        model,
        tf.data.Dataset.from_tensor_slices((rows, targets)).batch(len(rows)),
        microbatches=microbatches,
        verbose=0,
        **options,
    )
    return [np.asarray(v) for v in model.layers[0].non_trainable_variables]


def right(rows):
    """By hand, in float64: the statistics of all rows, once."""
    rows = rows.astype("float64")
    return (
        MOMENTUM * 0 + (1 - MOMENTUM) * rows.mean((0, 1, 2)),
        MOMENTUM * 1 + (1 - MOMENTUM) * rows.var((0, 1, 2)),
    )


@pytest.mark.parametrize(
    ("microbatches", "options"),
    mostly_long(
        [
            (microbatches, options)
            for microbatches in (1, 2, 4, 11)
            for options in ("plain", "optimized", "jit")
        ],
        always=[(4, "plain"), (2, "optimized"), (2, "jit")],
    ),
)
def test_averages_move_once_by_the_statistics_of_all_rows(
    microbatches, options
):
    named = {"plain": {}, "optimized": {"optimized": True}}
    moved = train(microbatches, **named.get(options, {options: True}))
    for value, expected in zip(moved, right(ROWS), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.slow
def test_each_replica_moves_them_by_its_whole_share(mirrored):
    rows = ROWS[:8]
    mean, variance = train(2, mirrored(2), rows=rows)
    halves = [right(half) for half in (rows[:4], rows[4:])]
    expected = np.mean(halves, axis=0)
    np.testing.assert_allclose([mean, variance], expected, rtol=1e-4)


def test_a_skipped_step_moves_none_of_them():
    rows = ROWS.copy()
    rows[3, 0, 0, 0] = np.nan
    mean, variance = train(2, rows=rows)
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_array_equal(variance, 1)
