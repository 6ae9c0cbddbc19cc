"""Overflow on one replica: every replica skips, whichever loop trains."""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long, mostly_slow

ROWS = 8
SCALE = 2.0**16


def build(strategy):
    """A model in float16 whose scaled gradients overflow for large targets."""
    keras.config.set_dtype_policy("mixed_float16")
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2)]
        )
        optimizer = tfamp.wrap_optimizer(
            keras.optimizers.AdamW(
                1e-2, global_clipnorm=1.0, use_ema=True, ema_momentum=0.5
            )
        )
        model.compile(optimizer, loss="mse", auto_scale_loss=False)
        optimizer.build(model.trainable_variables)
    return model


def batch(poisoned_rows=()):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((ROWS, 4)).astype("float32")
    y = x[:, :2].copy()
    # The loss stays finite; its gradient times 65536 is no float16.
    y[list(poisoned_rows)] = 1e4
    return tf.data.Dataset.from_tensors((x, y))


def with_stock_fit(model, datasets, look):
    for dataset in datasets:
        model.fit(dataset, verbose=0, shuffle=False)
        look()


def with_tfamp_fit(model, datasets, look):
    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            look()

    tfamp.fit(
        model,
        functools.reduce(tf.data.Dataset.concatenate, datasets),
        steps_per_loop=1,
        callbacks=[Look()],
        verbose=0,
        on_overflow="ignore",
    )


def with_hand_written_loop(model, datasets, look):
    strategy = model.distribute_strategy

    @tf.function
    def train_step(x, y):
        def step(x, y):
            _, gradients = tfamp.value_and_gradients(
                lambda: model.compute_loss(x, y, model(x, training=True)),
                model.trainable_variables,
                model.optimizer,
            )
            model.optimizer.apply(gradients, model.trainable_variables)

        strategy.run(step, args=(x, y))

    for dataset in datasets:
        for x, y in strategy.experimental_distribute_dataset(dataset):
            train_step(x, y)
        look()


def replicas_of(strategy, variable):
    return [
        value.numpy()
        for value in strategy.experimental_local_results(variable.value)
    ]


def snapshot(model):
    """Each replica's own copy of weights, moments, averages, iterations."""
    variables = model.weights + model.optimizer.inner_optimizer.variables
    return {
        variable.path: replicas_of(model.distribute_strategy, variable)
        for variable in variables
    }


def assert_equal_bit_for_bit(one, other):
    for path, values in one.items():
        for a, b in zip(values, other[path], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=path)


def finite_and_alike(state):
    return all(
        np.isfinite(values[0]).all()
        and all((value == values[0]).all() for value in values)
        for values in state.values()
    )


def counters(optimizer):
    return (
        float(optimizer.dynamic_scale.numpy()),
        int(optimizer.skipped_steps.numpy()),
        int(optimizer.consecutive_skips.numpy()),
        int(optimizer.iterations.numpy()),
    )


@pytest.mark.parametrize(
    ("replicas", "loop"),
    mostly_slow(
        itertools.product(
            (1, 2, 4), (with_stock_fit, with_tfamp_fit, with_hand_written_loop)
        ),
        always=[(2, with_tfamp_fit)],
    ),
)
def test_overflow_on_any_replica_skips_the_step_everywhere(
    mirrored, replicas, loop
):
    model = build(mirrored(replicas))
    seen = []
    datasets = [batch()]
    for replica in range(replicas):
        datasets.append(batch(poisoned_rows=[replica * ROWS // replicas]))
        datasets.append(batch())

    loop(
        model,
        datasets,
        lambda: seen.append((snapshot(model), *counters(model.optimizer))),
    )

    assert len(seen) == len(datasets)
    assert seen[0][1:] == (SCALE, 0, 0, 1)
    kernel = model.trainable_variables[0].path
    for clean, poisoned, next_clean in zip(
        seen[:-1:2], seen[1::2], seen[2::2], strict=True
    ):
        before, scale, skipped, _, steps = clean
        assert_equal_bit_for_bit(before, poisoned[0])
        assert poisoned[1:] == (scale / 2, skipped + 1, 1, steps)
        after = next_clean[0]
        assert finite_and_alike(after)
        assert next_clean[1:] == (scale / 2, skipped + 1, 0, steps + 1)
        assert (after[kernel][0] != before[kernel][0]).any()


@pytest.mark.slow
@pytest.mark.parametrize("replicas", mostly_long((1, 2, 4), always=[4]))
def test_overflow_on_all_replicas_counts_once(mirrored, replicas):
    model = build(mirrored(replicas))

    tfamp.fit(
        model,
        batch(poisoned_rows=range(ROWS)),
        verbose=0,
        on_overflow="ignore",
    )

    assert counters(model.optimizer) == (SCALE / 2, 1, 1, 0)


def test_overflow_that_only_the_sum_has_skips_the_step(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        variable = keras.Variable([1.0])
        optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD(1.0))
        optimizer.build([variable])

    @tf.function
    def run():
        # Each replica's is finite, their sum is not.
        strategy.run(lambda: optimizer.apply([tf.constant([3e38])], [variable]))

    run()

    assert variable.numpy() == [1.0]
    assert counters(optimizer) == (SCALE / 2, 1, 1, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_cross_in_16_bits_and_their_overflow_is_caught(
    mirrored, dtype
):
    strategy = mirrored(2)
    with strategy.scope():
        variable = keras.Variable([0.0])
        optimizer = tfamp.LossScaleOptimizer(
            keras.optimizers.SGD(1.0), initial_scale=1.0
        )
        optimizer.all_reduce_dtype = dtype
        optimizer.build([variable])

    @tf.function
    def run(gradient):
        strategy.run(optimizer.apply, args=([gradient], [variable]))

    run(tf.constant([1.0 + 2.0**-12]))  # rounds to 1 in either dtype
    assert variable.numpy() == [-2.0]

    run(tf.constant([65504.0 if dtype == "float16" else 3e38]))
    assert variable.numpy() == [-2.0]
    assert int(optimizer.skipped_steps.numpy()) == 1
