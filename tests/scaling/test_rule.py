"""The arithmetic of the scale, and the optimizer on one device."""

import copy
import importlib.util
import re
import unittest
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from tests.conftest import first_always
from tfamp.errors import InputError
from tfamp.scaling.optimizer import LossScaleOptimizer, wrap_optimizer
from tfamp.scaling.rule import ScaleRule, ScaleState, count_step, move_scale

RULE = ScaleRule(
    growth_factor=2.0,
    backoff_factor=0.5,
    growth_steps=3,
    min_scale=1.0,
    max_scale=64.0,
    hysteresis=1,
)


def state(scale=8.0, clean_steps=0, tolerance=1, skipped=0, consecutive=0):
    integers = (clean_steps, tolerance, skipped, consecutive)
    return ScaleState(
        ops.convert_to_tensor(scale, "float32"),
        *(ops.convert_to_tensor(value, "int64") for value in integers),
    )


def scales_after(pattern, rule=RULE, **start):
    """The scale after each step: '.' is finite, 'x' overflows."""
    current = state(**start)
    scales = []
    for step in pattern:
        current = move_scale(current, ops.convert_to_tensor(step == "."), rule)
        scales.append(float(current.scale))
    return scales


def test_overflow_halves_the_scale_and_three_clean_steps_double_it():
    assert scales_after("..x......") == [8, 8, 4, 4, 4, 8, 8, 8, 16]


def test_overflow_starts_the_count_of_clean_steps_again():
    assert scales_after("..x..x..") == [8, 8, 4, 4, 4, 2, 2, 2]


def test_scale_stops_at_its_floor_and_at_its_ceiling():
    assert scales_after("xxxxx") == [4, 2, 1, 1, 1]
    assert scales_after("." * 15)[2::3] == [16, 32, 64, 64, 64]


def test_hysteresis_bears_overflows_until_it_is_used_up():
    rule = RULE._replace(hysteresis=3)
    assert scales_after("x.x.x.x", rule, tolerance=3) == [
        *[8, 8, 8, 8],  # two overflows borne
        *[4, 4, 2],  # used up: from here on each one counts
    ]


def test_growth_gives_the_tolerance_back():
    rule = RULE._replace(hysteresis=2)
    assert scales_after("xx...xx", rule, tolerance=2) == [
        *[8, 4],
        *[4, 4, 8],
        *[8, 4],
    ]


def test_skips_are_counted_in_all_and_in_a_row():
    current = state()
    seen = []
    for step in "x.xx.":
        current = count_step(current, ops.convert_to_tensor(step == "."))
        seen.append(
            (int(current.skipped_steps), int(current.consecutive_skips))
        )
    assert seen == [(1, 1), (1, 0), (2, 1), (3, 2), (3, 0)]


def run_steps(optimizer, variable, finite_steps):
    """Applies one gradient of ones per flag, inf where it is False.

    Returns:
        The scale after each step, float32 `[steps]`.
    """

    @tf.function
    def run(flags):
        scales = tf.TensorArray(tf.float32, size=tf.size(flags))
        for i in tf.range(tf.size(flags)):
            gradient = tf.where(flags[i], optimizer.scale_loss(1.0), np.inf)
            optimizer.apply([tf.fill([2], gradient)], [variable])
            scales = scales.write(i, optimizer.dynamic_scale.value)
        return scales.stack()

    return run(tf.constant(finite_steps)).numpy()


@pytest.mark.parametrize(
    "finite_share",
    first_always([0.0, 0.3, 0.5, 0.9, 0.99, 1.0], 2),
    ids="{:.0%} finite".format,
)
def test_scale_never_reaches_zero_or_inf_in_ten_thousand_hostile_steps(
    finite_share,
):
    optimizer = LossScaleOptimizer(
        keras.optimizers.SGD(2.0**-20), dynamic_growth_steps=2
    )
    variable = keras.Variable([0.0, 0.0])
    optimizer.build([variable])
    flags = np.random.default_rng(0).random(10_000) < finite_share

    scales = run_steps(optimizer, variable, flags)

    assert scales.min() >= 1.0
    assert scales.max() <= 2.0**24
    assert int(optimizer.skipped_steps.numpy()) == np.sum(~flags)
    assert int(optimizer.iterations.numpy()) == np.sum(flags)
    # Every applied step took 2^-20 off, whatever the scale it came with.
    np.testing.assert_array_equal(
        variable.numpy(), -np.sum(flags) * np.float32(2.0**-20)
    )


@pytest.mark.parametrize("seed", range(5))
def test_scale_moves_as_torch_grad_scaler_does(seed):
    torch = pytest.importorskip(
        "torch", reason="needs torch: pip install 'tfamp[torch]'"
    )
    generator = np.random.default_rng(seed)
    growth_steps = int(generator.integers(2, 9))
    flags = generator.random(400) < generator.uniform(0.6, 0.97)
    # Bounds out of reach: GradScaler has none.
    optimizer = LossScaleOptimizer(
        keras.optimizers.SGD(1.0),
        dynamic_growth_steps=growth_steps,
        min_scale=2.0**-100,
        max_scale=2.0**100,
    )
    variable = keras.Variable([0.0, 0.0])
    optimizer.build([variable])
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**16, growth_interval=growth_steps
    )
    parameter = torch.nn.Parameter(torch.zeros(2))
    torch_optimizer = torch.optim.SGD([parameter], lr=1.0)
    torch_scales = []
    for finite in flags:
        scaler.scale(torch.ones(())).sum()
        parameter.grad = torch.full((2,), 1.0 if finite else float("inf"))
        scaler.step(torch_optimizer)
        scaler.update()
        torch_scales.append(scaler.get_scale())

    scales = run_steps(optimizer, variable, flags)

    np.testing.assert_array_equal(scales, torch_scales)


KERAS_TESTS = "keras.src.optimizers.loss_scale_optimizer_test"
# What Keras's tests expect and ours does not do, and why.
DIFFERENT_FROM_KERAS = {
    "test_downscaling": "starts at 400, no power of two: refused",
    "test_serialization": "starts at 3, and its config has 4 entries, ours 10",
    "test_init_dynamic_arg": "Keras refuses dynamic=False, tfamp has it",
}


@pytest.mark.skipif(
    importlib.util.find_spec(KERAS_TESTS) is None,
    reason="this Keras is installed without its tests",
)
def test_keras_own_tests_pass_but_for_the_named_differences(monkeypatch):
    module = importlib.import_module(KERAS_TESTS)
    monkeypatch.setattr(module, "LossScaleOptimizer", LossScaleOptimizer)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(
        module.LossScaleOptimizerTest
    )
    result = unittest.TestResult()

    # How Keras's tests convert their variables is deprecated in NumPy 2.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        suite.run(result)

    unlike = {
        re.sub("_stateful$", "", test.id().rpartition(".")[2]): trace
        for test, trace in result.failures + result.errors
    }
    assert set(unlike) == set(DIFFERENT_FROM_KERAS), unlike
    # Only the stateless variants, which Keras itself skips on TensorFlow.
    assert all("stateless" in reason for _, reason in result.skipped)
    assert result.testsRun - len(result.skipped) - len(unlike) >= 18


def test_gradients_are_unscaled_before_they_are_clipped():
    optimizer = LossScaleOptimizer(
        keras.optimizers.SGD(1.0, global_clipnorm=5.0), initial_scale=1024.0
    )
    variable = keras.Variable([0.0, 0.0])

    optimizer.apply([ops.array([6.0, 8.0]) * 1024.0], [variable])

    # Norm 10 is clipped to 5; clipped before unscaling it would be 5/1024.
    np.testing.assert_allclose(variable.numpy(), [-3.0, -4.0], rtol=1e-6)


def test_16_bit_gradients_are_unscaled_in_float32():
    optimizer = LossScaleOptimizer(
        keras.optimizers.SGD(2.0**20), initial_scale=2.0**16
    )
    variable = keras.Variable([0.0])
    # 2^-14 / 2^16 is 2^-30, which is zero in float16.
    gradient = ops.cast(ops.array([2.0**-14]), "float16")

    optimizer.apply([gradient], [variable])

    assert variable.numpy() == [-(2.0**-10)]


def test_float16_loss_does_not_overflow_when_it_is_scaled():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0))

    scaled = optimizer.scale_loss(ops.cast(3.0, "float16"))

    assert scaled.dtype == tf.float32
    assert float(scaled) == 3.0 * 2**16


def test_fixed_scale_of_one_adds_no_operation_to_the_gradients():
    optimizer = wrap_optimizer(keras.optimizers.SGD(1.0), "float32")
    loss = ops.array(3.0)
    assert optimizer.scale_loss(loss) is loss


def test_fixed_scale_survives_what_a_checkpoint_of_a_dynamic_one_holds():
    optimizer = LossScaleOptimizer(
        keras.optimizers.SGD(1.0), initial_scale=8.0, dynamic=False
    )
    variable = keras.Variable([0.0])
    optimizer.build([variable])
    optimizer.dynamic_scale.assign(2.0**16)

    optimizer.apply([ops.reshape(optimizer.scale_loss(1.0), [1])], [variable])

    assert variable.numpy() == [-1.0]
    assert float(optimizer.dynamic_scale.numpy()) == 8.0


def test_non_finite_step_is_skipped_and_counted_at_a_fixed_scale_too():
    optimizer = wrap_optimizer(keras.optimizers.Adam(1.0), "mixed_bfloat16")
    variable = keras.Variable([1.0])

    optimizer.apply([ops.array([np.nan])], [variable])

    assert variable.numpy() == [1.0]
    assert int(optimizer.skipped_steps.numpy()) == 1
    assert int(optimizer.iterations.numpy()) == 0
    assert float(optimizer.dynamic_scale.numpy()) == 1.0


@pytest.mark.parametrize(
    ("precision", "dynamic", "scale"),
    [
        ("mixed_float16", True, 2.0**16),
        ("mixed_bfloat16", False, 1.0),
        ("float32", False, 1.0),
    ],
)
def test_wrap_optimizer_scales_what_the_precision_needs(
    precision, dynamic, scale
):
    keras.config.set_dtype_policy(precision)
    for optimizer in (
        wrap_optimizer("adam"),
        wrap_optimizer(keras.optimizers.Adam(), precision),
    ):
        assert optimizer.dynamic is dynamic
        assert float(optimizer.dynamic_scale.numpy()) == scale


def test_every_precision_has_one_layout_of_variables():
    layouts = []
    for precision in ("float32", "mixed_bfloat16", "mixed_float16"):
        optimizer = wrap_optimizer(keras.optimizers.Adam(name="a"), precision)
        optimizer.build([keras.Variable([0.0], name="w")])
        layouts.append(
            [(v.name, v.shape, v.dtype) for v in optimizer.variables]
        )
    assert layouts[0] == layouts[1] == layouts[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_scale": 400.0}, "initial_scale=400.0 is no power of two"),
        ({"initial_scale": 0.0}, "initial_scale=0.0 is no power of two"),
        ({"max_scale": float("inf")}, "max_scale=inf is no power of two"),
        ({"growth_factor": 0.5}, "growth_factor=0.5 must be above 1"),
        ({"backoff_factor": 2.0}, "backoff_factor=2.0 must be below 1"),
        ({"initial_scale": 2.0**30}, "must lie between"),
        ({"dynamic_growth_steps": 0}, "dynamic_growth_steps=0"),
        ({"dynamic_growth_steps": 1.5}, "dynamic_growth_steps=1.5"),
        ({"hysteresis": 0}, "hysteresis=0"),
        ({"hysteresis": 2.5}, "hysteresis=2.5 must be a whole number"),
        ({"max_scale": 2.0**127}, "no normal reciprocal"),
        (
            {"initial_scale": 2.0**127, "dynamic": False},
            "no normal reciprocal",
        ),
    ],
)
def test_rules_that_cannot_work_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        LossScaleOptimizer(keras.optimizers.SGD(1.0), **options)


@pytest.mark.parametrize(
    "wrapper", [LossScaleOptimizer, keras.optimizers.LossScaleOptimizer]
)
def test_optimizer_that_scales_already_is_not_wrapped_again(wrapper):
    with pytest.raises(InputError, match="scales the loss already"):
        wrap_optimizer(wrapper(keras.optimizers.SGD(1.0)))


def test_unknown_all_reduce_dtype_is_refused():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0))
    with pytest.raises(InputError, match="Unknown all_reduce_dtype 'int8'"):
        optimizer.all_reduce_dtype = "int8"


def test_config_rebuilds_the_same_optimizer():
    optimizer = LossScaleOptimizer(
        keras.optimizers.AdamW(0.5),
        initial_scale=8.0,
        growth_factor=4.0,
        backoff_factor=0.25,
        dynamic_growth_steps=7,
        min_scale=2.0,
        max_scale=64.0,
        hysteresis=3,
        dynamic=True,
    )
    config = keras.saving.serialize_keras_object(optimizer)

    again = keras.saving.deserialize_keras_object(copy.deepcopy(config))

    assert type(again) is LossScaleOptimizer
    assert again.rule == optimizer.rule
    assert keras.saving.serialize_keras_object(again) == config
