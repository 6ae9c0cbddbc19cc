"""Which weights never train, and that a checkpoint can do without them."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.resumable_run import assert_same_bits, make_dataset, state_of
from tfamp import keras_internals
from tfamp.checkpoint import run_state
from tfamp.checkpoint.frozen import fingerprint, frozen_weights
from tfamp.checkpoint.store import Checkpoints, Position

BASE = ["base/kernel", "base/bias", "base_norm/gamma", "base_norm/beta"]
BASE += ["base_norm/moving_mean", "base_norm/moving_variance"]


def build_model(dtype="float32", units=8):
    """A frozen base with a dropout, and a head with statistics of its own."""
    keras.utils.set_random_seed(7)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input([4]),
            layers.Dense(units, trainable=False, dtype=dtype, name="base"),
            layers.BatchNormalization(trainable=False, name="base_norm"),
            layers.Dropout(0.25, trainable=False, name="base_dropout"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(3, name="head"),
        ]
    )
    model.compile(
        tfamp.wrap_optimizer(keras.optimizers.Adam(0.01)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        auto_scale_loss=False,
    )
    keras_internals.build_everything(model, make_dataset().element_spec)
    return model


def train(model, directory, epochs, **options):
    tfamp.fit(
        model,
        make_dataset(),
        epochs=epochs,
        checkpoint_dir=directory,
        on_overflow="ignore",
        verbose=0,
        **options,
    )
    return model


def paths(variables):
    return [re.sub(r"^sequential(_\d+)?/", "", v.path) for v in variables]


def test_what_a_layer_that_trains_keeps_is_not_frozen():
    assert paths(frozen_weights(build_model())) == BASE


def test_a_layer_that_trains_inside_a_frozen_one_is_not_frozen():
    inner = keras.Sequential(
        [keras.layers.Dense(2), keras.layers.BatchNormalization()], name="in"
    )
    model = keras.Sequential([keras.Input([2]), inner, keras.layers.Dense(1)])
    inner.trainable = False
    inner.layers[1].trainable = True
    assert frozen_weights(model) == inner.layers[0].weights
    inner.trainable = True
    assert frozen_weights(model) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_fingerprint_sees_a_single_bit(dtype):
    variable = keras.Variable(np.arange(12).reshape(3, 4), dtype=dtype)
    before = fingerprint(variable)
    assert fingerprint(keras.Variable(variable.value, dtype=dtype)) == before
    value = variable.numpy()
    value.view(np.uint8)[-1, -1] ^= 1
    variable.assign(value)
    assert fingerprint(variable) != before
    value.view(np.uint8)[-1, -1] ^= 1
    variable.assign(value)
    assert fingerprint(variable) == before
    variable.assign(value[::-1])
    assert fingerprint(variable) != before


def test_a_checkpoint_without_them_holds_all_else(tmp_path):
    model = build_model()
    Checkpoints(model, tmp_path, with_frozen=False).save(Position(1))
    prefix = str(tmp_path / "ckpt-1")
    saved = [row[0] for row in run_state.read_metadata(prefix)["variables"]]
    everything = paths([*model.variables, *model.metrics_variables])
    everything += paths(model.optimizer.variables)
    names = [re.sub(r"^sequential(_\d+)?/", "", path) for path in saved]
    assert sorted(names) == sorted({*everything} - {*BASE})
    assert any("seed" in name for name in names)
    assert "norm/moving_mean" in names
    # By its shape, which no other variable has.
    shapes = [shape for _, shape in tf.train.list_variables(prefix)]
    assert [8, 3] in shapes
    assert [4, 8] not in shapes
    Checkpoints(model, tmp_path / "all").save(Position(1))
    prefix = str(tmp_path / "all" / "ckpt-1")
    assert [4, 8] in [shape for _, shape in tf.train.list_variables(prefix)]


@pytest.mark.slow
def test_a_run_goes_on_without_them_in_its_checkpoints(tmp_path):
    expected = state_of(train(build_model(), None, epochs=4))
    train(build_model(), tmp_path, epochs=2, checkpoint_frozen=False)
    model = train(build_model(), tmp_path, epochs=4, checkpoint_frozen=False)
    assert_same_bits(state_of(model), expected)
    assert_same_bits(
        [w.numpy() for w in frozen_weights(model)],
        [w.numpy() for w in frozen_weights(build_model())],
    )


def test_other_frozen_weights_are_refused_in_one_line(tmp_path):
    model = build_model()
    Checkpoints(model, tmp_path, with_frozen=False).save(Position(1))
    other = build_model()
    other.get_layer("head").bias.assign([1.0, 2.0, 3.0])
    kernel = other.get_layer("base").kernel
    kernel.assign(np.nextafter(kernel.numpy(), np.float32(9)))
    before = state_of(other)
    with pytest.raises(
        tfamp.InputError, match=r"values of \S*base/kernel are not those here"
    ) as raised:
        train(other, tmp_path, epochs=2, checkpoint_frozen=False)
    assert "\n" not in str(raised.value)
    assert_same_bits(state_of(other), before)
    # A run that keeps them takes them from its checkpoint.
    Checkpoints(model, tmp_path / "all").save(Position(1))
    Checkpoints(other, tmp_path / "all").restore()
    assert_same_bits(state_of(other), state_of(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": 9}, r"is \(4, 8\) float32 there, .* \(4, 9\) float32"),
        ({"dtype": "bfloat16"}, r"float32 there, .* \(4, 8\) bfloat16"),
    ],
)
def test_frozen_weights_of_another_kind_are_told_apart(
    options, message, tmp_path
):
    model = build_model()
    Checkpoints(model, tmp_path, with_frozen=False).save(Position(0))
    other = Checkpoints(build_model(**options), tmp_path, with_frozen=False)
    with pytest.raises(tfamp.InputError, match=message):
        other.restore()


@pytest.mark.parametrize("with_frozen", [True, False])
def test_a_checkpoint_says_whether_it_holds_them(with_frozen, tmp_path):
    model = build_model()
    Checkpoints(model, tmp_path, with_frozen=with_frozen).save(Position(0))
    other = Checkpoints(model, tmp_path, with_frozen=not with_frozen)
    with pytest.raises(
        tfamp.InputError, match=f"checkpoint_frozen={with_frozen}"
    ):
        other.restore()


def test_replicas_have_the_fingerprints_of_one_device(mirrored, tmp_path):
    Checkpoints(build_model(), tmp_path, with_frozen=False).save(Position(3))
    with mirrored(2).scope():
        model = build_model()
    checkpoints = Checkpoints(model, tmp_path, with_frozen=False)
    assert checkpoints.restore() == Position(3)
