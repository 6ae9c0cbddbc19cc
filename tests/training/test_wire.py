"""float32 forward, float16 between replicas, float32 update."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import first_always

ROWS = np.ones((8, 4), "float32")


def dataset(steps=1):
    return tf.data.Dataset.from_tensors((ROWS, ROWS[:, :1])).repeat(steps)


def build_model(factor, optimizer):
    """A model each of whose four gradients is `factor`."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
        ]
    )
    model.compile(optimizer, lambda y, prediction: prediction * factor)
    return model


@pytest.mark.parametrize("factor", first_always([1e-8, 1e-3, 1e5], 1))
def test_gradients_of_any_size_cross_in_float16(mirrored, factor):
    with mirrored(2).scope():
        model = build_model(factor, keras.optimizers.SGD(1.0))
    # The scale starts at 2^16 and must reach 1/2 for the largest.
    skips = 17 if factor == 1e5 else 0
    history = tfamp.fit(
        model, dataset(skips + 1), verbose=0, all_reduce_dtype="float16"
    )
    assert sum(history.history["skipped_steps"]) == skips
    np.testing.assert_allclose(model.get_weights()[0], -factor, rtol=2**-11)
    # What makes it right: the sum was one of float16 numbers.
    assert not np.array_equal(
        model.get_weights()[0], np.full((4, 1), -np.float32(factor))
    )


def test_fit_says_that_it_scales_the_loss(mirrored, capsys):
    with mirrored(2).scope():
        model = build_model(1e-3, tfamp.wrap_optimizer("sgd", "float32"))
    tfamp.fit(model, dataset(), verbose=2, all_reduce_dtype="float16")
    assert "scales the loss" in capsys.readouterr().out
    assert model.optimizer.dynamic
    assert float(model.optimizer.dynamic_scale.numpy()) == 2.0**16


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_other_wires_leave_the_scale_at_one(mirrored, dtype):
    with mirrored(2).scope():
        model = build_model(1.0, tfamp.wrap_optimizer("sgd", "float32"))
    tfamp.fit(model, dataset(), verbose=0, all_reduce_dtype=dtype)
    assert not model.optimizer.dynamic


def test_a_scale_fixed_at_one_by_hand_is_refused(mirrored):
    with mirrored(2).scope():
        optimizer = tfamp.LossScaleOptimizer(
            keras.optimizers.SGD(), initial_scale=1.0, dynamic=False
        )
        model = build_model(1.0, optimizer)
    with pytest.raises(tfamp.InputError, match=r"below 2\^-24 would be lost"):
        tfamp.fit(model, dataset(), verbose=0, all_reduce_dtype="float16")


def test_dynamic_scaling_asked_for_in_float32_starts_high():
    optimizer = tfamp.wrap_optimizer("sgd", "float32", dynamic=True)
    assert optimizer.initial_scale == 2.0**16


@pytest.mark.slow
def test_the_forward_pass_stays_float32_and_a_run_goes_on(mirrored, tmp_path):
    def train(epochs, dtype):
        with mirrored(2).scope():
            keras.utils.set_random_seed(1)
            model = build_model(0.3, tfamp.wrap_optimizer("sgd", "float32"))
        tfamp.fit(
            model,
            dataset(),
            epochs=epochs,
            verbose=0,
            all_reduce_dtype=dtype,
            checkpoint_dir=tmp_path / str(dtype),
        )
        return model

    fresh = train(1, "float16")
    exact = fresh.get_weights()[0]
    assert fresh(ROWS).dtype == "float32"
    np.testing.assert_array_equal(fresh(ROWS), ROWS @ exact)
    train(1, None)
    again = train(2, "float16")
    np.testing.assert_allclose(again.get_weights()[0], 2 * exact, rtol=2**-10)


def test_lint_finds_a_wire_of_float16_without_a_scale():
    optimizer = tfamp.LossScaleOptimizer(
        keras.optimizers.SGD(), initial_scale=1.0, dynamic=False
    )
    optimizer.all_reduce_dtype = "float16"
    model = build_model(1.0, optimizer)
    assert [each.rule for each in tfamp.lint(model)] == ["float16-wire"]
    optimizer.scale_for_float16_wire()
    assert not tfamp.lint(model)
