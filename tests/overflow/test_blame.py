"""Who overflowed first: planted in a network, and named.

One training run has all the planted steps; what was said of each is looked at
in a test of its own.
"""

import dataclasses
import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long
from tfamp import keras_internals
from tfamp.training.callbacks import ScaleTimeline

# What is planted in 16 bits is to stay there.
fit_unkept = functools.partial(tfamp.fit, keep_float32=False)

LAYERS, ROWS = 20, 8
SIGNAL, FORWARD, BACKWARD, SCALE = range(4)
CLOCKS = ("examples_per_second", "step_milliseconds")


class Planted(keras.layers.Layer):
    """Gains 300 * 300 forward or backward where a row's code names it.

    The code is a column of the row; the column of the scale gains 300 only.
    """

    def __init__(self, number, **options):
        super().__init__(**options)
        self.number = number

    def build(self, shape):
        self.gain = self.add_weight((), "ones", name="gain")

    def call(self, x):
        gains = 1 + 299 * tf.cast(x[:, FORWARD:] == self.number, x.dtype)
        forward, backward, little = tf.split(gains, 3, axis=1)

        @tf.custom_gradient
        def through(y):
            return tf.identity(y), lambda g: g * backward * backward * little

        return through(x * self.gain) * forward * forward


@dataclasses.dataclass(frozen=True)
class Plant:
    """What goes wrong in a batch: which column of which row says what."""

    row: int
    column: int
    value: float
    at_fault: str
    layer: str | None
    says: str


def plant(row, column, number, at_fault, says):
    return Plant(row, column, number, at_fault, f"planted_{number}", says)


# Two replicas have rows 0 to 3 and 4 to 7.
PLANTS = [
    plant(6, SCALE, 9, "scale", r"times 1024, .* at most 303\. That is normal"),
    plant(5, FORWARD, 1, "forward", "the output of layer planted_1 on"),
    plant(2, FORWARD, 7, "forward", "in float32 it reaches .* beyond float16"),
    plant(7, FORWARD, 20, "forward", r"keep_float32\(model, layers="),
    plant(4, BACKWARD, 1, "backward", "weight [a-z_1/]*gain on"),
    plant(1, BACKWARD, 11, "backward", "it reaches 9e.04, beyond float16's"),
    plant(5, BACKWARD, 20, "backward", "first gradient that is not finite"),
    Plant(6, SIGNAL, np.nan, "data", None, "the inputs hold .* in row 6 of"),
]


def total(y_true, y_pred):
    """Of which the gradient by each signal is 1."""
    return ROWS * y_pred[:, SIGNAL]


def build(strategy, layers=LAYERS):
    with tfamp.precision_scope("mixed_float16"), strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                *(
                    Planted(i + 1, name=f"planted_{i + 1}")
                    for i in range(layers)
                ),
            ],
            name="planted",
        )
        optimizer = tfamp.wrap_optimizer(
            keras.optimizers.SGD(1e-9), initial_scale=1024.0
        )
        model.compile(optimizer, total, auto_scale_loss=False)
    return model


def data(plants, clean=1):
    """Clean batches, and one for each plant, after which come clean ones."""
    batch = np.zeros((ROWS, 4), "float32")
    batch[:, SIGNAL] = 1
    batches = [batch]
    for each in plants:
        wrong = batch.copy()
        wrong[each.row, each.column] = each.value
        batches += [wrong, *[batch] * clean]
    x = np.concatenate(batches)
    dataset = tf.data.Dataset.from_tensor_slices((x, x[:, 0]))
    return dataset.batch(ROWS, drop_remainder=True)


class Events(ScaleTimeline):
    """Keeps the events, too."""

    def __init__(self, folder):
        super().__init__(folder)
        self.all = []

    def on_scale_event(self, event):
        super().on_scale_event(event)
        self.all.append(event)

    @property
    def overflows(self):
        return [event for event in self.all if event.reason == "overflow"]


@pytest.fixture
def events(tmp_path):
    return Events(tmp_path)


@pytest.fixture(scope="module")
def planted(mirrored, tmp_path_factory):
    """Events and lines of a run in which each plant comes up once."""
    from absl import logging

    events, lines = Events(tmp_path_factory.mktemp("planted")), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "warning", lambda t, *v: lines.append(t % v))
        fit_unkept(
            build(mirrored(2)),
            data(PLANTS),
            on_overflow="blame",
            steps_per_loop=5,
            callbacks=[events],
            verbose=0,
        )
    return events.overflows, lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "index", range(len(PLANTS)), ids=lambda i: f"{PLANTS[i].at_fault}-{i}"
)
def test_what_overflowed_first_is_named_with_its_replica(planted, index):
    overflows, lines = planted
    expected, event = PLANTS[index], overflows[index]
    assert len(overflows) == len(lines) == len(PLANTS)
    assert event.step == 2 * index + 2
    assert event.scale == 512.0 / 2**index
    blame = event.blame
    assert (blame.at_fault, blame.layer) == (expected.at_fault, expected.layer)
    assert blame.replica == expected.row // 4
    assert blame.worker == 0
    assert f"on replica {expected.row // 4}" in blame.message
    assert lines[index].startswith(f"epoch 1, step {event.step}: the step was")
    assert re.search(expected.says, lines[index])
    assert ("normal" in lines[index]) == (expected.at_fault == "scale")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("microbatches", "jit"),
    mostly_long([(2, False), (1, True)], always=[(2, False)]),
)
def test_pieces_and_xla_do_not_hide_it(mirrored, events, microbatches, jit):
    plants = [
        plant(7, FORWARD, 2, "forward", ""),
        plant(0, BACKWARD, 1, "backward", ""),
    ]
    fit_unkept(
        build(mirrored(2), layers=2),
        data(plants),
        on_overflow="blame",
        microbatches=microbatches,
        jit=jit,
        callbacks=[events],
        verbose=0,
    )
    said = [
        (event.blame.at_fault, event.blame.layer, event.blame.replica)
        for event in events.overflows
    ]
    assert said == [("forward", "planted_2", 1), ("backward", "planted_1", 0)]


class MeanOfMany(keras.layers.Layer):
    """Of 2**14 sixteens: their sum is beyond float16, their mean is not."""

    def call(self, x):
        ones = tf.ones([1, 2**14], x.dtype) * tf.reduce_max(x * 0 + 16)
        return x + 0 * tf.reduce_mean(ones)


def test_a_replay_sums_in_float32_as_the_step_does(events):
    with tfamp.precision_scope("mixed_float16"):
        inputs = keras.Input((4,))
        x = MeanOfMany(name="mean")(inputs)
        outputs = Planted(1, name="planted_1")(x)
        model = keras.Model(inputs, outputs)
        optimizer = tfamp.wrap_optimizer(
            keras.optimizers.SGD(1e-9), initial_scale=1024.0
        )
        model.compile(optimizer, total, auto_scale_loss=False)
    fit_unkept(
        model,
        data([plant(5, FORWARD, 1, "forward", "")]),
        on_overflow="blame",
        callbacks=[events],
        verbose=0,
    )
    (event,) = events.overflows
    assert event.blame.layer == "planted_1"


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_replay_draws_the_numbers_of_the_step(events, microbatches):
    with tfamp.precision_scope("mixed_float16"):
        model = keras.Sequential(
            [
                keras.Input((1,)),
                keras.layers.Dropout(0.5, seed=3, name="drop"),
                keras.layers.Dense(1, name="dense"),
            ]
        )
    optimizer = tfamp.wrap_optimizer(keras.optimizers.SGD(0.0), "mixed_float16")
    model.compile(optimizer, "mse", auto_scale_loss=False)
    # Twice 4e4, which dropout makes of what it keeps, is beyond float16.
    x = np.full((2, 1), 4e4, "float32")
    x[1] = 0.0
    dataset = tf.data.Dataset.from_tensors((x, x)).repeat(40)
    fit_unkept(
        model,
        dataset,
        on_overflow="blame",
        microbatches=microbatches,
        callbacks=[events],
        verbose=0,
    )
    blames = [e.blame for e in events.overflows if e.blame is not None]
    assert len(blames) >= 5
    assert {blame.layer for blame in blames} <= {"drop", "dense"}
    said = [b for b in blames if (b.at_fault, b.layer) == ("forward", "drop")]
    assert len(said) >= 3
    assert "unknown" not in {blame.at_fault for blame in blames}


class Averaged(keras.Model):
    """A step of its own, that keeps an average of a weight."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(3, name="first")
        self.logarithm = keras.layers.Lambda(keras.ops.log, name="logarithm")
        self.average = self.add_weight(shape=(4, 3), initializer="zeros")

    def call(self, x, training=False):
        return self.logarithm(self.first(x))

    def train_step(self, batch):
        x, y = batch
        loss, gradients = tfamp.value_and_gradients(
            lambda: self.compute_loss(x, y, self(x, training=True)),
            self.first.trainable_variables,
            self.optimizer,
        )
        self.optimizer.apply(gradients, self.first.trainable_variables)
        self.average.assign(0.5 * (self.average + self.first.kernel))
        return {"loss": loss}


class Noisy(keras.Model):
    """A step of its own, that draws without a seed."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(1)

    def call(self, x):
        return self.first(x)

    def train_step(self, batch):
        x, y = batch
        x += keras.random.normal(keras.ops.shape(x))
        loss, gradients = tfamp.value_and_gradients(
            lambda: self.compute_loss(x, y, self(x)),
            self.trainable_variables,
            self.optimizer,
        )
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def test_a_step_may_be_the_first_that_draws_without_a_seed():
    keras_internals.forget_global_seed_generator()
    model = Noisy()
    optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD(0.01))
    model.compile(optimizer, "mse", auto_scale_loss=False)
    rows = np.ones((8, 2), "float32"), np.ones((8, 1), "float32")
    batches = tf.data.Dataset.from_tensor_slices(rows).batch(4)
    history = fit_unkept(model, batches, on_overflow="blame", verbose=0)
    assert np.isfinite(history.history["loss"][0])


def averaged(strategy):
    with strategy.scope():
        model = Averaged()
        optimizer = tfamp.LossScaleOptimizer(keras.optimizers.SGD(0.01))
        model.compile(optimizer, "mse", auto_scale_loss=False)
        model(np.ones((1, 4), "float32"))
        model.first.kernel.assign(np.full((4, 3), 0.1))
        optimizer.build(model.first.trainable_variables)
    return model


def stateful(strategy):
    with tfamp.precision_scope("mixed_float16"), strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(8),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.3, seed=1),
                keras.layers.Dense(3),
            ]
        )
        model.compile(
            tfamp.wrap_optimizer(
                keras.optimizers.Adam(0.01),
                initial_scale=2.0**14,
                dynamic_growth_steps=4,
            ),
            "mse",
            metrics=["mae"],
            auto_scale_loss=False,
        )
    return model


class Calls(keras.callbacks.Callback):
    """What a callback of the user's sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        logs = {n: v for n, v in logs.items() if n not in CLOCKS}
        self.seen.append((batch, logs))


def train(make, strategy, **options):
    """All that a run leaves, clocks apart."""
    keras.utils.set_random_seed(0)
    model, calls = make(strategy), Calls()
    generator = np.random.default_rng(0)
    x = np.abs(generator.normal(size=(15 * 4, 4))).astype("float32")
    # Of each third batch a row is too large, or has no logarithm. It is in
    # the first of two pieces, so that a replay need not come to the second.
    x[2::12] *= -1e4
    dataset = tf.data.Dataset.from_tensor_slices((x, x[:, :3]))
    history = fit_unkept(
        model,
        dataset.batch(4, drop_remainder=True),
        epochs=2,
        callbacks=[calls],
        verbose=0,
        **options,
    ).history
    variables = [*model.variables, *model.optimizer.variables]
    return (
        [
            value.numpy()
            for variable in variables
            for value in strategy.experimental_local_results(variable.value)
        ],
        {n: v for n, v in history.items() if n not in CLOCKS},
        calls.seen,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "replicas", "steps_per_loop", "microbatches"),
    mostly_long(
        [(stateful, 1, 7, 1), (stateful, 2, 1, 2), (averaged, 2, 7, 1)],
        always=[(stateful, 2, 1, 2)],
    ),
)
def test_blaming_changes_no_number_of_the_training(
    mirrored, warnings_of_absl, make, replicas, steps_per_loop, microbatches
):
    strategy = mirrored(replicas)
    options = {"steps_per_loop": steps_per_loop, "microbatches": microbatches}
    with np.errstate(all="ignore"):
        expected = train(make, strategy, on_overflow="log", **options)
        assert not any("at fault" in line for line in warnings_of_absl)
        actual = train(make, strategy, on_overflow="blame", **options)
    assert any("at fault" in line for line in warnings_of_absl)
    for one, other in zip(actual[0], expected[0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert actual[1]["skipped_steps"][0] >= 3
    np.testing.assert_equal(actual[1:], expected[1:])


def test_a_step_of_the_models_own_is_looked_into(mirrored, events):
    strategy = mirrored(2)
    x = np.ones((3, 4, 4), "float32")
    # Its logarithm is none, on the second replica.
    x[1, 2] = -1.0
    dataset = tf.data.Dataset.from_tensor_slices((x, x[..., :3]))
    fit_unkept(
        averaged(strategy),
        dataset,
        on_overflow="blame",
        callbacks=[events],
        verbose=0,
    )
    (event,) = events.overflows
    assert (event.step, event.blame.at_fault) == (2, "forward")
    assert (event.blame.layer, event.blame.replica) == ("logarithm", 1)


def test_of_many_stretches_only_some_are_replayed(events):
    rows = [plant(0, FORWARD, 1, "forward", "")] * 18
    model = build(tf.distribute.get_strategy(), layers=1)
    fit_unkept(
        model, data(rows), on_overflow="blame", callbacks=[events], verbose=0
    )
    replayed = [
        number
        for number, event in enumerate(events.overflows, start=1)
        if event.blame is not None
    ]
    assert len(events.overflows) == 18
    assert replayed == [1, 2, 3, 4, 5, 6, 7, 8, 16]


def test_of_a_stretch_the_first_step_is_replayed(events, warnings_of_absl):
    rows = [plant(0, FORWARD, 1, "forward", "")] * 4
    model = build(tf.distribute.get_strategy(), layers=1)
    fit_unkept(
        model,
        data(rows, clean=0),
        on_overflow="blame",
        steps_per_loop=3,
        callbacks=[events],
        verbose=0,
    )
    blames = [event.blame for event in events.overflows]
    assert [event.step for event in events.overflows] == [2, 3, 4, 5]
    assert [blame is not None for blame in blames] == [True, *[False] * 3]
    # Those that were not replayed are counted where training reports.
    counts = [
        int(number)
        for line in warnings_of_absl
        for number in re.findall(r"skipped (\d+) step", line)
    ]
    assert sum(counts) == 3
