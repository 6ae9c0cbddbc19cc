"""What a user learns about steps that were not finite."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from keras import layers

import tfamp
from tfamp import overflow


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


def infinite_loss(y_true, y_pred):
    return keras.ops.sum(y_pred) * 0.0 + keras.ops.sum(y_true) / 0.0


def negative_before_the_norm():
    model = build_model(Logarithm(name="log"))
    model.get_layer("norm").beta.assign([-9.0] * 4)
    return model


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (build_model, {"x": with_one(np.nan, (4, 4))}, "the inputs hold inf"),
        (build_model, {"y": with_one(np.inf, (4, 2))}, "the targets hold inf"),
        (
            build_model,
            {"weight": with_one(np.nan, (4,))},
            "the sample weights hold inf",
        ),
        (spoiled_weights, {}, "weights are at fault: model/last/kernel holds"),
        (
            negative_before_the_norm,
            {},
            "forward pass is at fault: .* is that of layer model/log",
        ),
        (
            lambda: build_model(loss=infinite_loss),
            {},
            "loss is at fault: the model's outputs are finite, it is not",
        ),
        (
            lambda: build_model(SquareRoot()),
            # What the norm gives is 0, as all rows are alike.
            {},
            "backward pass is at fault: .* is that of model/norm/beta",
        ),
    ],
)
def test_the_first_thing_that_is_not_finite_is_named(make, data, message):
    with np.errstate(all="ignore"):
        said = overflow.explain(make(), batches(**data))
    assert re.search(message, said), said


def test_only_the_scaling_is_blamed_where_gradients_fit_without_it():
    keras.config.set_dtype_policy("mixed_float16")
    model = build_model()
    said = overflow.explain(model, batches(y=np.full((4, 2), 1e3, "float32")))
    assert "Only the scaling is at fault" in said
    assert "lower min_scale" in said


def test_nothing_is_blamed_where_all_is_finite():
    assert "did not reproduce it" in overflow.explain(build_model(), batches())


def test_a_later_batch_is_found_too():
    good, bad = batches(), batches(x=with_one(np.inf, (4, 4)))
    said = overflow.explain(build_model(), good.concatenate(bad))
    assert "the inputs hold inf" in said


@pytest.mark.parametrize("replicas", [1, 2])
def test_explaining_changes_nothing(replicas, mirrored):
    with mirrored(replicas).scope():
        model = build_model()
    tfamp.fit(model, batches(), verbose=0)

    def state():
        variables = [
            *model.variables,
            *model.optimizer.variables,
            *model.metrics_variables,
        ]
        return [
            value.numpy()
            for variable in variables
            for value in mirrored(replicas).experimental_local_results(
                variable.value
            )
        ]

    before = state()
    overflow.explain(model, batches())
    for one, other in zip(before, state(), strict=True):
        np.testing.assert_array_equal(one, other)
    for layer in model.layers:
        assert "call" not in vars(layer)


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
    finite = tf.data.Dataset.from_tensors((rows, tf.ones((2, 2))))
    assert "did not reproduce" in overflow.explain(model, finite)
    wrong = tf.data.Dataset.from_tensors((rows, tf.fill((2, 2), np.nan)))
    assert "the targets hold inf or NaN" in overflow.explain(model, wrong)


@pytest.fixture
def lines(monkeypatch):
    """What is logged as a warning."""
    logged = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: logged.append(text % args)
    )
    return logged


def skip(optimizer, times=1):
    for _ in range(times):
        optimizer.apply([tf.constant([np.inf])])


def built_optimizer(**options):
    optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD(), **options)
    optimizer.build([keras.Variable([1.0])])
    return optimizer


def test_a_line_tells_how_many_steps_were_skipped_and_the_scale(lines):
    optimizer = built_optimizer()
    watch = overflow.OverflowWatch({"optimizer": optimizer}, "log", str)
    watch.check("epoch 1, step 1")
    assert lines == []
    skip(optimizer, 2)
    watch.check("epoch 1, step 3")
    watch.check("epoch 1, step 4")
    (line,) = lines
    assert line == (
        "epoch 1, step 3: skipped 2 step(s) that were not finite; the loss "
        "scale is now 16384."
    )


def test_logs_count_the_steps_of_an_epoch_and_name_several_optimizers(lines):
    one, two = built_optimizer(), built_optimizer(initial_scale=4.0)
    skip(one)
    watch = overflow.OverflowWatch({"g": one, "d": two}, "log", str)
    watch.begin_epoch()
    skip(two)
    assert watch.logs() == {
        "loss_scale_g": 2.0**15,
        "skipped_steps_g": 0,
        "loss_scale_d": 2.0,
        "skipped_steps_d": 1,
    }
    watch.check("here")
    assert "the loss scale of d is now 2" in lines[0]
    watch.begin_epoch()
    assert watch.logs()["skipped_steps_d"] == 0


def test_ignoring_says_nothing_and_stopping_says_why(lines):
    optimizer = built_optimizer()
    quiet = overflow.OverflowWatch({"o": optimizer}, "ignore", str)
    strict = overflow.OverflowWatch({"o": optimizer}, "stop", lambda: "Why.")
    skip(optimizer)
    quiet.check("here")
    assert lines == []
    with pytest.raises(tfamp.LossScaleError, match=r"here: 1 step.* Why\."):
        strict.check("here")


def test_a_floor_that_is_too_high_ends_training_after_patience():
    optimizer = built_optimizer(initial_scale=2.0, min_scale=1.0)
    watch = overflow.OverflowWatch(
        {"o": optimizer}, "ignore", lambda: "The reason."
    )
    skip(optimizer, overflow.PATIENCE_AT_FLOOR - 1)
    watch.check("here")
    skip(optimizer)
    with pytest.raises(
        tfamp.LossScaleError,
        match=r"20 steps in a row .* at its floor of 1\. The reason\.",
    ):
        watch.check("here")


def test_overflows_above_the_floor_do_not_end_training():
    optimizer = built_optimizer(initial_scale=2.0**24)
    watch = overflow.OverflowWatch({"o": optimizer}, "ignore", str)
    skip(optimizer, 23)
    watch.check("here")
    assert float(optimizer.dynamic_scale.numpy()) == 2.0


def test_fit_stops_at_the_first_skipped_step_when_asked():
    model = build_model()
    with pytest.raises(
        tfamp.LossScaleError, match=r"on_overflow is 'stop'\. The data are"
    ):
        tfamp.fit(
            model,
            batches(x=with_one(np.inf, (4, 4))),
            verbose=0,
            on_overflow="stop",
        )
    assert np.isfinite(model.get_weights()[0]).all()
