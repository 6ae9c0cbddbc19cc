"""What a user learns about steps that were not finite."""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import first_always
from tfamp.overflow import watch as overflow
from tfamp.overflow.blame import Blame

# What is planted in 16 bits is to stay there.
fit_unkept = functools.partial(tfamp.fit, keep_float32=False)


class Logarithm(layers.Layer):
    def call(self, x):
        return keras.ops.log(x)


class SquareRoot(layers.Layer):
    """Finite at 0, with a gradient that is not."""

    def call(self, x):
        return keras.ops.sqrt(keras.ops.relu(x))


def build_model(middle=None, **compile_options):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, seed=1),
            *([middle] if middle else []),
            layers.Dense(2, name="last"),
        ],
        name="model",
    )
    compile_options = {"loss": "mse"} | compile_options
    model.compile(
        tfamp.LossScaleOptimizer(keras.optimizers.Adam()), **compile_options
    )
    return model


def batches(x=None, y=None, weight=None):
    parts = [
        np.ones((4, 4), "float32") if x is None else x,
        np.ones((4, 2), "float32") if y is None else y,
    ]
    if weight is not None:
        parts.append(weight)
    return tf.data.Dataset.from_tensors(tuple(parts))


def with_one(value, shape):
    array = np.ones(shape, "float32")
    array.flat[-1] = value
    return array


def spoiled_weights():
    model = build_model()
    model.get_layer("last").kernel.assign(with_one(np.nan, (4, 2)))
    return model


def root_of_a_negative_number(y_true, y_pred):
    return keras.ops.sqrt(-1.0 - keras.ops.sum((y_pred - y_true) ** 2))


def negative_before_the_norm():
    model = build_model(Logarithm(name="log"))
    model.get_layer("norm").beta.assign([-9.0] * 4)
    return model


def said_of(model, dataset, **options):
    """What stopping at the first overflow says."""
    with np.errstate(all="ignore"), pytest.raises(tfamp.LossScaleError) as info:
        fit_unkept(model, dataset, on_overflow="stop", verbose=0, **options)
    return str(info.value)


@pytest.mark.parametrize(
    ("make", "data", "message"),
    first_always(
        [
            (
                build_model,
                {"x": with_one(np.nan, (4, 4))},
                "the inputs hold inf or NaN in row 3 of the batch",
            ),
            (
                build_model,
                {"y": with_one(np.inf, (4, 2))},
                "the targets hold inf or NaN in row 3",
            ),
            (
                build_model,
                {"weight": with_one(np.nan, (4,))},
                "the sample weights hold inf or NaN in row 3",
            ),
            (
                spoiled_weights,
                {},
                "weights are at fault: model/last/kernel holds",
            ),
            (
                negative_before_the_norm,
                {},
                "forward pass is at fault: .* is the output of layer log",
            ),
            (
                lambda: build_model(loss=root_of_a_negative_number),
                {},
                "loss is at fault: what the layers give is finite, the loss is "
                "not",
            ),
            (
                lambda: build_model(SquareRoot(name="root")),
                # What the norm gives is 0, as all rows are alike.
                {},
                "backward pass is at fault: .* layer root passes on to its "
                "input",
            ),
        ],
        4,
    ),
)
def test_the_first_thing_that_is_not_finite_is_named(make, data, message):
    said = said_of(make(), batches(**data))
    assert re.match("epoch 1, step 1: the step was not finite, and on_", said)
    assert re.search(message, said), said


def in_float16(**compile_options):
    with tfamp.precision_scope("mixed_float16"):
        return build_model(**compile_options)


@pytest.mark.parametrize(
    ("data", "message"),
    first_always(
        [
            (
                {"y": np.full((4, 2), 1e3, "float32")},
                "Only the scale is at fault: times 65536, .* at the output of "
                "layer last; at scale 1 all are finite, and in float32 this "
                "one",
            ),
            (
                {"x": np.full((4, 4), 1e5, "float32")},
                "data are at fault: the inputs reach 1e.05, beyond float16's "
                "65504",
            ),
            (
                {"y": np.full((4, 2), 3e6, "float32")},
                "backward pass is at fault: .* arrives at the output of layer "
                r"last\. That is float16's range: in float32 it reaches "
                r"7\.5e.05",
            ),
        ],
        1,
    ),
)
def test_what_float32_would_bear_is_told_from_what_it_would_not(data, message):
    said = said_of(in_float16(), batches(**data))
    assert re.search(message, said), said


def test_the_batch_that_overflowed_is_tried_and_no_other():
    bad = batches(x=with_one(np.inf, (4, 4)))
    dataset = batches().repeat(4).concatenate(bad).concatenate(batches())
    said = said_of(build_model(), dataset, steps_per_loop=6)
    assert re.match("epoch 1, step 5: .* the inputs hold inf", said), said


def test_a_sum_that_overflows_alone_is_told(mirrored):
    with mirrored(2).scope():
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
        optimizer = tfamp.LossScaleOptimizer(
            keras.optimizers.SGD(), dynamic=False, initial_scale=2.0
        )
        model.compile(optimizer, lambda y, y_pred: y * y_pred)
    # Each replica's scaled gradient is 4e4, and crosses in float16.
    x, y = np.full((2, 1), 2.0, "float32"), np.full((2, 1), 2e4, "float32")
    dataset = tf.data.Dataset.from_tensors((x, y))
    said = said_of(model, dataset, all_reduce_dtype="float16")
    assert "finite on each of them, but not their sum in float16" in said


def test_ragged_inputs_and_sparse_gradients_are_looked_into():
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(5, 3),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2),
        ]
    )
    model.compile(tfamp.LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    rows = tf.cast(tf.ragged.range([1, 3]), tf.int32)
    wrong = tf.data.Dataset.from_tensors((rows, tf.fill((2, 2), np.nan)))
    assert "the targets hold inf or NaN in row 0" in said_of(model, wrong)


def test_nothing_is_left_of_a_replay():
    model = in_float16()
    before = model.get_weights()
    said_of(model, batches(x=with_one(np.inf, (4, 4))))
    for one, other in zip(before, model.get_weights(), strict=True):
        if one.dtype.kind == "f":
            np.testing.assert_array_equal(one, other)
    for layer in model.layers:
        assert "call" not in vars(layer)
        assert layer.compute_dtype == "float16"
    for name in ("apply", "scale_loss"):
        assert name not in vars(model.optimizer)
    assert float(model.optimizer.dynamic_scale.numpy()) == 2.0**15


def skip(optimizer, times=1):
    for _ in range(times):
        optimizer.apply([tf.constant([np.inf])])


def built_optimizer(**options):
    optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD(), **options)
    optimizer.build([keras.Variable([1.0])])
    return optimizer


class Teller:
    """Stands in for a replay; counts how often it is asked."""

    def __init__(self, at_fault="forward"):
        self.asked = 0
        self._blame = Blame(at_fault, "The reason.")

    def __call__(self):
        self.asked += 1
        return self._blame


def watch_of(action, replay=None, **optimizers):
    return overflow.OverflowWatch(optimizers, action, replay)


def test_a_line_tells_how_many_steps_were_skipped_and_the_scale(
    warnings_of_absl,
):
    optimizer = built_optimizer()
    watch = watch_of("log", o=optimizer)
    watch.check("epoch 1, step 1")
    assert warnings_of_absl == []
    skip(optimizer, 2)
    watch.check("epoch 1, step 3")
    watch.check("epoch 1, step 4")
    (line,) = warnings_of_absl
    assert line == (
        "epoch 1, step 3: skipped 2 step(s) that were not finite; the loss "
        "scale is now 16384, which is normal now and then: it searches."
    )


@pytest.mark.parametrize(
    ("options", "skips", "says"),
    [
        ({}, 11, "is now 32, after 11 in a row; on_overflow='blame' says why."),
        ({"initial_scale": 2.0}, 1, "is now 1, its floor."),
        (
            {"initial_scale": 1.0, "dynamic": False},
            1,
            "the loss scale is fixed at 1.",
        ),
    ],
)
def test_only_a_search_for_the_scale_is_called_normal(
    warnings_of_absl, options, skips, says
):
    optimizer = built_optimizer(**options)
    watch = watch_of("log", o=optimizer)
    skip(optimizer, skips)
    watch.check("here")
    (line,) = warnings_of_absl
    assert line.endswith(says)
    assert "normal" not in line


def test_logs_count_the_steps_of_an_epoch_and_name_several_optimizers(
    warnings_of_absl,
):
    one, two = built_optimizer(), built_optimizer(initial_scale=4.0)
    skip(one)
    watch = watch_of("log", g=one, d=two)
    watch.begin_epoch()
    skip(two)
    assert watch.logs() == {
        "loss_scale_g": 2.0**15,
        "skipped_steps_g": 0,
        "loss_scale_d": 2.0,
        "skipped_steps_d": 1,
    }
    watch.check("here")
    assert "the loss scale of d is now 2" in warnings_of_absl[0]
    watch.begin_epoch()
    assert watch.logs()["skipped_steps_d"] == 0


def test_ignoring_says_nothing_and_stopping_says_why(warnings_of_absl):
    optimizer, teller = built_optimizer(), Teller()
    quiet = watch_of("ignore", teller, o=optimizer)
    strict = watch_of("stop", teller, o=optimizer)
    skip(optimizer)
    quiet.look("here", 0, 1)
    quiet.check("here")
    assert warnings_of_absl == []
    assert teller.asked == 0
    with pytest.raises(tfamp.LossScaleError, match=r"here: .* The reason"):
        strict.look("here", 0, 1)
    assert teller.asked == 1


@pytest.mark.parametrize(
    ("at_fault", "options", "says"),
    [
        ("scale", {}, "That is normal: the scale is dynamic and searches"),
        ("scale", {"initial_scale": 2.0}, "can come no lower: lower min_scale"),
        ("forward", {}, "was skipped. The reason."),
    ],
)
def test_blame_calls_normal_what_is_only_the_scale(
    warnings_of_absl, at_fault, options, says
):
    optimizer = built_optimizer(**options)
    watch = watch_of("blame", Teller(at_fault), o=optimizer)
    skip(optimizer)
    watch.look("here", 0, 1)
    watch.check("here")
    (line,) = warnings_of_absl
    assert says in line


def test_a_floor_that_is_too_high_ends_training_after_patience():
    optimizer, teller = built_optimizer(initial_scale=2.0), Teller()
    watch = watch_of("ignore", teller, o=optimizer)
    for step in range(1, overflow.PATIENCE_AT_FLOOR):
        skip(optimizer)
        watch.look("here", 0, step)
    assert teller.asked == 0
    skip(optimizer)
    with pytest.raises(
        tfamp.LossScaleError,
        match=r"20 steps in a row .* at its floor of 1\. The reason\.",
    ):
        watch.look("here", 0, overflow.PATIENCE_AT_FLOOR)


def test_overflows_above_the_floor_do_not_end_training():
    optimizer = built_optimizer(initial_scale=2.0**24)
    watch = watch_of("ignore", o=optimizer)
    skip(optimizer, 23)
    watch.look("here", 0, 23)
    assert float(optimizer.dynamic_scale.numpy()) == 2.0


@pytest.mark.slow
def test_training_ends_at_the_very_step_that_is_one_too_many(mirrored):
    with mirrored(2).scope():
        model = build_model()
    bad = batches(x=with_one(np.inf, (4, 4)))
    optimizer = model.optimizer
    with pytest.raises(tfamp.LossScaleError, match=r"step 20: 20 .* row 3"):
        fit_unkept(
            model,
            bad.repeat(60),
            steps_per_loop=50,
            on_overflow="ignore",
            verbose=0,
        )
    # It took sixteen of them to come to the floor.
    assert int(optimizer.skipped_steps.numpy()) == 20
    assert np.isfinite(model.get_weights()[0]).all()
