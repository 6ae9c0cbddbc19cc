"""Which layers need float32: planted, and found by measurement."""

import dataclasses
import itertools
import json
import math
import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfamp
from tfamp import cli
from tfamp.analysis.report import write
from tfamp.recipe import run_config


class Cancel(layers.Layer):
    """Adds 300 and takes it away: bfloat16 rounds the rest away."""

    def call(self, x):
        shift = ops.cast(300.0, x.dtype)
        return (x + shift) - shift


class Gain(layers.Layer):
    """Between two of them numbers are beyond float16's range."""

    def __init__(self, factor, **options):
        super().__init__(**options)
        self.factor = factor

    def call(self, x):
        return x * ops.cast(self.factor, x.dtype)


def sequence(*planted):
    """A classifier with something in the middle of it."""
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, activation="tanh", name="first"),
            *planted,
            layers.Dense(16, activation="tanh", name="second"),
            layers.Dense(4, name="logits"),
        ],
        name="network",
    )


def data(batches=3, rows=16):
    numbers = np.random.default_rng(0)
    x = numbers.normal(size=(batches * rows, 8)).astype("float32")
    y = numbers.integers(0, 4, batches * rows)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(
        rows, drop_remainder=True
    )


def compiled(build, strategy=None):
    keras.utils.set_random_seed(1)
    with (strategy or tf.distribute.get_strategy()).scope():
        model = build()
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    return model


def tune(model, precision="mixed_bfloat16", **options):
    return tfamp.tune(model, data(), precision=precision, **options)


def state_of(model):
    return [np.asarray(variable) for variable in model.variables]


def state_of_training(model):
    variables = [*model.optimizer.variables, *model.metrics_variables]
    return [*state_of(model), *map(np.asarray, variables)]


@pytest.fixture(scope="module")
def cancelled():
    """A model with a cancellation, its state before tuning, and a report."""
    model = compiled(lambda: sequence(Cancel(name="planted")))
    before = state_of(model)
    policies = [layer.dtype_policy.name for layer in model.layers]
    return model, before, policies, tune(model)


def test_a_cancellation_in_bfloat16_is_put_back_and_nothing_else(cancelled):
    _, _, _, report = cancelled
    assert report.float32_layers == ("planted",)
    assert report.scores["planted"] == max(report.scores.values())
    (none, everything), (layer, error) = report.path
    assert (none, layer) == (None, "planted")
    assert error <= report.limit < everything
    assert report.unmapped_layers == ()
    assert "reach" not in report.reason
    # Not only behind the switch, but in the model as it runs.
    assert report.costs["all"]["error"] == pytest.approx(everything, rel=0.05)
    assert report.costs["tuned"]["error"] == pytest.approx(error, rel=0.2)
    assert not report.unseen_error


def test_sensitivities_add_in_squares(cancelled):
    _, _, _, report = cancelled
    predicted = math.hypot(*report.scores.values())
    assert predicted == pytest.approx(report.path[0].error, rel=0.2)


def test_the_model_is_bit_for_bit_as_before(cancelled):
    model, before, policies, _ = cancelled
    assert [layer.dtype_policy.name for layer in model.layers] == policies
    for value, former in zip(state_of(model), before, strict=True):
        np.testing.assert_array_equal(value, former)
    assert type(model.optimizer) is keras.optimizers.Adam
    assert "call" not in vars(model.get_layer("planted"))


def test_the_map_gives_a_model_its_precisions(cancelled, tmp_path):
    _, _, _, report = cancelled
    wanted = ["bfloat16", "float32", "bfloat16", "bfloat16"]
    report.save(tmp_path / "tune.json")
    other = compiled(lambda: sequence(Cancel(name="planted")))
    report.apply(other)
    assert [layer.compute_dtype for layer in other.layers] == wanted
    assert tfamp.set_precision(tmp_path / "tune.json") == "mixed_bfloat16"
    built = compiled(lambda: sequence(Cancel(name="planted")))
    assert [layer.compute_dtype for layer in built.layers] == wanted
    assert np.isfinite(tfamp.fit(built, data(), verbose=0).history["loss"][0])


def test_recipes_take_the_map_and_no_other_precision_beside_it(
    cancelled, tmp_path, capsys
):
    path = tmp_path / "tune.json"
    cancelled[-1].save(path)
    config = run_config.RunConfig(
        strategy="one_device", precision_map=str(path)
    )
    run_config.start(config)
    assert "precision mixed_bfloat16" in capsys.readouterr().out
    policy = keras.config.dtype_policy()
    (planted,) = cancelled[-1].policy_paths["planted"]
    assert policy[planted].compute_dtype == "float32"
    other = dataclasses.replace(config, precision="float32")
    with pytest.raises(tfamp.InputError, match="leave one of them out"):
        run_config.start(other)


def test_a_model_without_a_tuned_layer_is_refused(cancelled):
    _, _, _, report = cancelled
    other = compiled(sequence)
    with pytest.raises(tfamp.InputError, match="no layer 'planted'"):
        report.apply(other)
    assert {layer.compute_dtype for layer in other.layers} == {"float32"}


def test_the_json_fits_its_schema_and_makes_a_page(
    cancelled, tmp_path, fits_schema
):
    _, _, _, report = cancelled
    report.save(tmp_path / "tune.json")
    record = json.loads((tmp_path / "tune.json").read_text())
    fits_schema(record)
    assert record["scores"][0]["layer"] == "planted"
    assert record["narrow_shares"] == {"all": 1, "tuned": 1}
    page = write.write(tmp_path).read_text()
    assert "with 1 layer in float32: planted" in page


class Pathless(Cancel):
    """As ReLU: Keras gives no path to what says that it is built."""

    def __init__(self, **options):
        super().__init__(**options)
        self.built = True


class Around(layers.Layer):
    """Cannot take two precisions, and holds what has no path."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = layers.Dense(16, name="inner")
        self.cancel = Pathless(name="cancel")

    def call(self, x):
        return x + self.cancel(self.inner(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "pathless"),
    [(Pathless, ("planted",)), (Around, ("planted/cancel",))],
)
def test_what_keras_gives_no_path_is_put_back_by_tfamp(
    planted, pathless, tmp_path
):
    def build():
        return compiled(lambda: sequence(planted(name="planted")))

    report = tune(build())
    assert report.float32_layers == ("planted",)
    assert report.unmapped_layers == pathless
    assert f"alone does not reach {pathless[0]}" in report.reason
    assert pathless[0] not in str(list(report.dtype_policy_map()))
    report.save(tmp_path / "tune.json")
    tfamp.set_precision(tmp_path / "tune.json")
    model = build()
    tfamp.fit(model, data(), verbose=0)
    layer = model.get_layer("planted")
    found = [layer.compute_dtype, getattr(layer, "cancel", layer).compute_dtype]
    assert found == ["float32", "float32"]
    assert model.get_layer("second").compute_dtype == "bfloat16"


def test_as_many_other_layers_put_back_do_not_mend(cancelled):
    _, _, _, report = cancelled
    others = [layer for layer in report.scores if layer != "planted"]
    chosen = random.Random(0).choice(others)
    rest = [v for layer, v in report.scores.items() if layer != chosen]
    assert math.hypot(*rest) > report.limit


@pytest.mark.long
@pytest.mark.parametrize("other", ["first", "second", "logits"])
def test_another_layer_in_float32_is_measured_not_to_mend(cancelled, other):
    _, _, _, report = cancelled
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = compiled(lambda: sequence(Cancel(name="planted")))
    model.get_layer(other).dtype_policy = "float32"
    found = tune(model)
    assert found.path[0].error > 0.9 * report.path[0].error > found.limit
    assert found.float32_layers == ("planted",)


@pytest.mark.long
def test_both_ends_of_a_range_fault_in_float16_are_put_back():
    model = compiled(
        lambda: sequence(Gain(1e6, name="up"), Gain(1e-6, name="down"))
    )
    report = tune(model, "mixed_float16")
    assert set(report.float32_layers) == {"up", "down"}
    assert report.scores["up"] == math.inf
    assert report.path[0].error == math.inf
    assert "mixed_float16 the gradient is not finite;" in report.reason
    assert report.path[-1].error <= report.limit
    assert report.loss_scale > 1


@pytest.mark.slow
def test_what_leaves_the_range_is_put_back_though_no_gradient_shows_it():
    # tanh of infinity is 1, as it is of 1e6.
    saturated = layers.Activation("tanh", name="saturated")
    gains = Gain(1e3, name="within"), Gain(1e3, name="beyond")
    model = compiled(lambda: sequence(*gains, saturated))
    report = tune(model, "mixed_float16")
    assert max(report.scores.values()) < report.limit
    assert set(report.float32_layers) == {"beyond", "saturated"}


@pytest.mark.long
@pytest.mark.parametrize(
    "others", list(itertools.combinations(["first", "second", "logits"], 2))
)
def test_two_other_layers_in_float32_do_not_mend_a_range_fault(others):
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled(
        lambda: sequence(Gain(1e6, name="up"), Gain(1e-6, name="down"))
    )
    for name in others:
        model.get_layer(name).dtype_policy = "float32"
    report = tune(model, "mixed_float16")
    assert report.path[0].error == math.inf
    assert set(report.float32_layers) == {"up", "down"}


@pytest.mark.long
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_of_a_sound_model_no_layer_is_put_back(precision):
    report = tune(compiled(sequence), precision)
    assert report.float32_layers == ()
    assert len(report.path) == 1
    assert report.costs["tuned"] == report.costs["all"]


class Block(layers.Layer):
    """Layers, and a cancellation in the code around them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = layers.Dense(16, name="inner")
        self.dropout = layers.Dropout(0.2, name="dropout")

    def call(self, x, training=False):
        self.add_loss(1e-3 * ops.mean(ops.square(x)))
        shift = ops.cast(300.0, x.dtype)
        return self.dropout(self.inner((x + shift) - shift), training=training)


class Subclassed(keras.Model):
    """Its own train_step, blocks in it, batch statistics, a nested model."""

    def __init__(self):
        super().__init__(name="subclassed")
        self.first = layers.Dense(
            16, activity_regularizer=keras.regularizers.L2(1e-3), name="first"
        )
        self.norm = layers.BatchNormalization(name="norm")
        self.block = Block(name="block")
        self.head = keras.Sequential(
            [layers.Dense(4, name="logits")], name="head"
        )
        self.unused = layers.ReLU(name="unused")

    def call(self, x, training=False):
        x = self.norm(self.first(x), training=training)
        return self.head(self.block(x, training=training))

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
            loss = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


@pytest.mark.slow
def test_blocks_of_somebody_and_own_train_steps():
    def build():
        model = Subclassed()
        model(np.zeros((16, 8), "float32"))
        return model

    model = compiled(build)
    model.optimizer.build(model.trainable_variables)
    before = state_of(model)
    report = tune(model)
    # Its own code, not the layers in it.
    assert report.float32_layers == ("block",)
    assert {"subclassed", "block/inner", "head/logits"} <= {*report.scores}
    assert report.unseen_layers == ("unused",)
    assert report.path[-1].error <= report.limit
    # The model behind the switch is the one without it, with its losses.
    assert report.costs["float32"]["error"] < 1e-5
    for value, former in zip(state_of(model), before, strict=True):
        np.testing.assert_array_equal(value, former)
    report.apply(model)
    assert model.block.compute_dtype == "float32"
    assert model.block.inner.compute_dtype == "bfloat16"


class Residual(layers.Layer):
    """Adds what a layer makes, as TensorFlow adds: in one dtype."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = layers.Dense(16, name="inner")

    def call(self, x):
        return x + self.inner(x)


@pytest.mark.slow
def test_a_layer_that_cannot_take_two_precisions_is_switched_as_a_whole():
    report = tune(compiled(lambda: sequence(Residual(name="residual"))))
    assert {*report.scores} == {"first", "residual", "second", "logits"}
    assert report.float32_layers == ()
    assert set(report.policy_paths["residual"]) == {
        "network/residual",
        "network/residual/inner",
    }
    other = compiled(lambda: sequence(Residual(name="residual")))
    report.apply(other)
    assert other.get_layer("residual").inner.compute_dtype == "bfloat16"
    assert np.isfinite(tfamp.fit(other, data(), verbose=0).history["loss"][0])


class Failing(layers.Layer):
    """A layer in a layer, and around it something that goes wrong."""

    def __init__(self, dtypes, **options):
        super().__init__(**options)
        self.inner = layers.Dense(16, name="inner")
        self.dtypes = dtypes
        self.calls = None

    def call(self, x):
        x = self.inner(x)
        if self.calls is not None:
            self.calls.append(self.compute_dtype)
            # The first one is of what looks at the model before.
            if len(self.calls) > 1 and self.compute_dtype in self.dtypes:
                raise RuntimeError("out of paper")
        return x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtypes", "calls"),
    [
        # What fails in float32 too is not tried as a whole.
        (["float32", "bfloat16"], ["float32"]),
        (["bfloat16"], ["float32", "bfloat16", "float32", "bfloat16"]),
    ],
)
def test_a_fault_of_another_kind_is_told_as_it_is(dtypes, calls):
    model = compiled(lambda: sequence(Failing(dtypes, name="failing")))
    failing = model.get_layer("failing")
    failing.calls = []
    with pytest.raises(RuntimeError, match="out of paper"):
        tune(model)
    assert failing.calls[1:] == calls
    assert failing.compute_dtype == "float32"


class Normed(layers.Layer):
    """A norm of its own, a cancellation, and a shortcut."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = layers.Dense(16, name="inner")

    def call(self, x):
        square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        x = (x + 300.0) - 300.0
        return x + self.inner(x * ops.rsqrt(square + 1e-6))


@pytest.mark.slow
def test_after_keep_float32_layers_are_put_back_that_take_inputs_as_they_come():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = compiled(lambda: sequence(Normed(name="normed")))
    kept = tfamp.keep_float32(model)
    assert any("normed: " in str(e) and "as they come" in str(e) for e in kept)
    report = tune(model)
    # In 16 bits its code takes both precisions, and in float32 none but that.
    assert report.float32_layers == ("normed",)
    assert "normed/inner" not in report.scores
    # It gets bfloat16 of the layer before, behind the switch as it runs.
    everything = report.costs["all"]["error"]
    assert everything == pytest.approx(report.path[0].error, rel=0.05)
    assert report.costs["tuned"]["error"] <= report.limit
    report.apply(model)
    assert np.isfinite(tfamp.fit(model, data(), verbose=0).history["loss"][0])


class WithMask(layers.Layer):
    """A norm of its own, and a mask that float16 cannot hold."""

    def call(self, x):
        square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        mask = (ops.zeros_like(square) - 3e4) * 3e4
        return x * ops.rsqrt(square + 1e-6), mask


@pytest.mark.slow
@pytest.mark.parametrize("is_kept", [False, True])
def test_what_keep_float32_kept_leaves_the_range_in_float32(is_kept):
    def build():
        inputs = keras.Input((8,))
        x = layers.Dense(16, activation="tanh", name="first")(inputs)
        x, _ = WithMask(name="masked")(x)
        x = layers.Dense(16, activation="tanh", name="second")(x)
        return keras.Model(inputs, layers.Dense(4, name="logits")(x))

    keras.config.set_dtype_policy("mixed_float16")
    model = compiled(build)
    if is_kept:
        tfamp.keep_float32(model)
    report = tune(model, "mixed_float16")
    expected = set() if is_kept else {"masked", "second"}
    assert set(report.float32_layers) == expected


@pytest.mark.slow
def test_every_format_is_measured_on_the_same_batches():
    def noise(precision):
        model = compiled(sequence)
        shuffled = data().unbatch().shuffle(48, seed=1).batch(16)
        return tfamp.tune(model, shuffled, precision=precision).noise

    assert noise("mixed_float16") == noise("mixed_bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_a_training_goes_on_as_if_nothing_had_been_measured(precision):
    keras.config.set_dtype_policy(precision)
    ends = []
    for tuned in (False, True):
        model = compiled(
            lambda: sequence(
                layers.BatchNormalization(), layers.Dropout(0.3, seed=2)
            )
        )
        tfamp.fit(model, data(), verbose=0)
        if tuned:
            before = state_of_training(model)
            tune(model, precision)
            for value, former in zip(
                state_of_training(model), before, strict=True
            ):
                np.testing.assert_array_equal(value, former)
        tfamp.fit(model, data(), verbose=0)
        ends.append(state_of_training(model))
    for untouched, measured in zip(*ends, strict=True):
        np.testing.assert_array_equal(measured, untouched)


@pytest.mark.slow
def test_scores_on_two_replicas_are_those_on_one(mirrored, cancelled):
    _, _, _, report = cancelled
    model = compiled(lambda: sequence(Cancel(name="planted")), mirrored(2))
    before = state_of(model)
    other = tune(model)
    for value, former in zip(state_of(model), before, strict=True):
        np.testing.assert_array_equal(value, former)
    assert other.float32_layers == report.float32_layers
    assert other.noise == pytest.approx(report.noise, rel=1e-6)
    # It has no weights: what it rounds, it rounds row by row.
    assert other.scores["planted"] == pytest.approx(
        report.scores["planted"], rel=1e-6
    )
    for layer, score in report.scores.items():
        # The gradient of each half of the rows is rounded by itself.
        assert other.scores[layer] == pytest.approx(score, rel=0.1), layer
    # And that is all: two halves on one replica are rounded so, too.
    alone = compiled(lambda: sequence(Cancel(name="planted")))
    halves = tune(alone, microbatches=2)
    assert other.noise == pytest.approx(halves.noise, rel=1e-6)
    assert other.scores == pytest.approx(dict(halves.scores), rel=1e-6)
    assert [e.error for e in other.path] == pytest.approx(
        [e.error for e in halves.path], rel=1e-6
    )


class Activity(layers.Layer):
    """Adds a sum over rows to the loss."""

    def call(self, x):
        self.add_loss(1e-2 * ops.sum(ops.square(ops.cast(x, "float32"))))
        return x


@pytest.mark.slow
def test_a_sum_is_measured_as_the_sum_that_it_is(mirrored):
    def build():
        return sequence(Activity(name="activity"))

    one = tune(compiled(build))
    assert one.costs["float32"]["error"] < 1e-5
    assert one.noise == pytest.approx(
        tune(compiled(build, mirrored(2))).noise, rel=1e-6
    )
    assert one.noise == pytest.approx(
        tune(compiled(build), microbatches=2).noise, rel=1e-6
    )


class Spread(layers.Layer):
    """Feature by feature from 1 to 3e-8, and back: no scale fits all."""

    def __init__(self, power, **options):
        super().__init__(**options)
        self.factors = 10.0 ** (power * np.arange(16) / 2)

    def call(self, x):
        return x * ops.cast(self.factors, x.dtype)


@pytest.mark.slow
def test_a_product_that_8_bits_cannot_hold_is_put_back(tmp_path):
    def build():
        spread = layers.Dense(
            16, kernel_initializer="identity", trainable=False, name="spread"
        )
        return sequence(Spread(-1, name="down"), spread, Spread(1, name="up"))

    model = compiled(build)
    before = state_of(model)
    types = [type(layer) for layer in model.layers]
    report = tune(model, "float8", budget=0.3)
    assert report.precision == "float8"
    assert report.float32_layers == ("spread",)
    assert report.path[-1].error <= report.limit < report.path[0].error
    # As it runs too, and not only behind the switch.
    everything, tuned = (
        report.costs[each]["error"] for each in ("all", "tuned")
    )
    assert everything == pytest.approx(report.path[0].error, rel=0.05)
    assert tuned == pytest.approx(report.path[-1].error, rel=0.2)
    assert [type(layer) for layer in model.layers] == types
    assert "float8_settings" not in vars(model.get_layer("second"))
    for value, former in zip(state_of(model), before, strict=True):
        np.testing.assert_array_equal(value, former)
    with pytest.raises(tfamp.InputError, match="optimizer"):
        report.apply(model)
    assert model.get_layer("second").compute_dtype == "float32"

    report.save(tmp_path / "tune.json")
    assert tfamp.set_precision(tmp_path / "tune.json") == "float8"
    other = compiled(build)
    tfamp.fit(other, data(), verbose=0)
    in_8_bits = [e.name for e in other.layers if hasattr(e, "float8_settings")]
    assert in_8_bits == ["second"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 1}, "steps"),
        ({"budget": 0}, "budget=0"),
        ({"precision": "float32"}, "float32"),
    ],
)
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises(tfamp.InputError, match=match):
        tfamp.tune(compiled(sequence), data(), **options)


def test_formats_that_cannot_be_tuned_are_refused(capsys):
    arguments = ["tune", "recipes.digits", "--formats=int8", "--output_dir=x"]
    assert cli.main(arguments) == 2
    expected = "expected some of bfloat16, float16, float8"
    assert expected in capsys.readouterr().err


def test_what_is_no_map_is_refused(tmp_path):
    path = tmp_path / "tune.json"
    for text in ("", "[]", '{"schema": "tfamp.bench/1"}', None):
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(tfamp.InputError, match="Precision map"):
            tfamp.set_precision(str(path))
