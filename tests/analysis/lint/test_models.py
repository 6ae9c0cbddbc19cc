"""Lint on whole models: all kinds of them, the shipped, and as they were."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from recipes import image_classification
from tests.conftest import mostly_slow
from tests.matmul_dtypes import small_transformer
from tfamp.analysis.lint.check import lint
from tfamp.checkpoint.random_state import get_random_state
from tfamp.recipe.subject import open_subject


def rules_of(model, batch=None):
    return {each.rule for each in lint(model, batch)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "name"),
    mostly_slow(
        [
            ("float32", "resnet_small"),
            ("mixed_bfloat16", "resnet_small"),
            ("mixed_float16", "resnet_small"),
            ("mixed_float16", "resnet50"),
        ],
        always=[("mixed_float16", "resnet_small")],
    ),
)
def test_nothing_is_found_in_the_image_recipe(precision, name):
    config = image_classification.Config(
        precision=precision, model=name, strategy="one_device"
    )
    subject = open_subject(image_classification, config)
    batch = next(iter(subject.train_batches))
    assert lint(subject.model, batch) == []


@pytest.mark.slow
def test_models_of_keras_applications_can_be_looked_at():
    keras.config.set_dtype_policy("mixed_float16")
    options = {"weights": None, "input_shape": (32, 32, 3), "classes": 8}
    model = keras.applications.MobileNetV2(alpha=0.35, **options)
    assert rules_of(model) == {"sensitive-output"}
    model = keras.applications.MobileNet(alpha=0.25, **options)
    tfamp.keep_float32(model)
    assert lint(model) == []


@pytest.mark.slow
def test_keep_float32_leaves_a_transformer_clean():
    keras.config.set_dtype_policy("mixed_float16")
    model, loss, x, y = small_transformer()
    found = rules_of(model)
    assert "attention-softmax" in found
    tfamp.keep_float32(model)
    optimizer = tfamp.wrap_optimizer("adam")
    model.compile(optimizer, loss=loss, auto_scale_loss=False)
    # The heads are 4 and 2 wide, which no policy changes.
    assert rules_of(model, (x, y)) == {"unaligned-size"}


class Parts(keras.Model):
    """Takes a dict, masks, returns a dict, and holds a layer in a list."""

    def __init__(self):
        super().__init__()
        self.embed = layers.Embedding(16, 8, mask_zero=True)
        self.stack = [layers.LSTM(8, return_sequences=True), layers.LSTM(8)]
        self.heads = {"a": layers.Dense(8), "b": layers.Dense(3)}

    def call(self, inputs, training=False):
        x = self.embed(inputs["tokens"])
        for layer in self.stack:
            x = layer(x)
        x = keras.ops.concatenate([x, inputs["extra"]], axis=-1)
        return {name: head(x) for name, head in self.heads.items()}


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [True, False])
def test_dicts_masks_and_several_outputs_are_no_obstacle(is_compiled):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = Parts()
    x = {
        "tokens": np.ones((2, 5), "int32"),
        "extra": np.ones((2, 8), "float32"),
    }
    model(x)
    y = {"a": np.ones((2,), "int32"), "b": np.ones((2, 3), "float32")}
    expected = set()
    if is_compiled:
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(True)
        model.compile(
            "sgd",
            loss={"a": cross_entropy, "b": "mse"},
            metrics={"a": ["accuracy"], "b": ["mae"]},
        )
        expected = {"rounded-output"}
    assert rules_of(model, (x, y)) == expected
    assert "not-traced" not in rules_of(model, (x, y, np.ones((2,))))


def test_labels_are_guessed_where_no_batch_is_given():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4)])
    for loss, metrics in (
        ("sparse_categorical_crossentropy", ["accuracy"]),
        ("categorical_crossentropy", ["accuracy", "auc"]),
        ("mse", ["mae"]),
    ):
        model.compile("sgd", loss=loss, metrics=metrics)
        assert lint(model) == []


class Odd(keras.Model):
    """Returns a tensor of unknown rank, a number and a None."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(8)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        x = self.dense(x)
        unknown = tf.numpy_function(lambda a: a, [x], x.dtype)
        return {"x": x, "unknown": unknown, "none": None, "number": 1.5}


def test_outputs_that_no_label_fits_are_no_obstacle():
    model = Odd()
    model.build((None, 8))
    assert lint(model) == []
    model.compile("sgd", loss="mse")
    assert rules_of(model) == {"not-traced"}


class Failing(layers.Layer):
    def call(self, x):
        raise RuntimeError("no graph of mine")

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


def test_a_model_that_cannot_be_traced_is_told_as_such():
    inputs = keras.Input((8,))
    x = Failing()(inputs)
    model = keras.Model(inputs, layers.Dense(8, dtype="bfloat16")(x))
    found = {each.rule: each for each in lint(model)}
    assert set(found) == {"not-traced", "weights-in-16-bits"}
    assert "no graph of mine" in found["not-traced"].message


def test_sparse_input_is_told_as_not_traced():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8)])
    sparse = tf.sparse.from_dense(np.eye(8, dtype="float32"))
    (finding,) = lint(model, (sparse,))
    assert finding.rule == "not-traced"
    assert "SparseTensor" in finding.message


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (keras.Sequential([layers.Dense(3)]), ["not built", "model.build("]),
        (layers.Dense(3), ["Dense", "keras.Sequential([layer])"]),
        ("recipe.py", ["str"]),
    ],
)
def test_what_is_no_built_model_is_turned_down_with_the_fix(model, words):
    with pytest.raises(tfamp.InputError) as raised:
        tfamp.lint(model)
    for word in words:
        assert word in str(raised.value)


class Adversaries(keras.Model):
    """Has no `call`, two parts, and an optimizer for each."""

    def __init__(self):
        super().__init__()
        self.maker = keras.Sequential([keras.Input((8,)), layers.Dense(8)])
        self.judge = keras.Sequential([keras.Input((8,)), layers.Dense(8)])

    def compile(self, of_maker, of_judge):
        super().compile()
        self.of_maker, self.of_judge = of_maker, of_judge

    def train_step(self, noise):
        weights = self.maker.trainable_variables
        loss, gradients = tfamp.value_and_gradients(
            lambda: tf.reduce_mean(self.judge(self.maker(noise))),
            weights,
            self.of_maker,
        )
        self.of_maker.apply(gradients, weights)
        weights = self.judge.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.cast(self.judge(noise), tf.float32))
        gradients = tape.gradient(loss, [v.value for v in weights])
        self.of_judge.apply(gradients, weights)
        return {"loss": loss}


def test_a_model_without_a_call_is_looked_at_through_its_step():
    keras.config.set_dtype_policy("mixed_float16")
    model = Adversaries()
    scaled = [tfamp.wrap_optimizer("sgd") for _ in range(2)]
    model.compile(*scaled)
    found = lint(model, np.ones((4, 8), "float32"))
    # And nothing of the optimizer that Keras makes up in `compile`.
    assert [each.rule for each in found] == ["unscaled-train-step"]


class Noisy(keras.Model):
    """Draws without a seed, adds losses, and has a step of its own."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(8, activity_regularizer="l2")
        self.norm = layers.BatchNormalization()
        self.drop = layers.Dropout(0.5)

    def call(self, x, training=False):
        random.random()
        np.random.uniform()
        x = self.norm(self.dense(x), training=training)
        noise = keras.random.normal(keras.ops.shape(x), dtype=x.dtype)
        x = self.drop(x + noise)
        self.add_loss(keras.ops.mean(x))
        return keras.ops.cast(x, "float32")

    def train_step(self, data):
        x, y = data

        def loss_fn():
            return self.compute_loss(x, y, self(x, training=True))

        loss, gradients = tfamp.value_and_gradients(
            loss_fn, self.trainable_variables, self.optimizer
        )
        self.optimizer.apply(gradients, self.trainable_variables)
        return self.compute_metrics(x, y, self(x)) | {"loss": loss}


def state_of(model):
    """All that a step would move, as bytes and plain values."""
    variables = [*model.variables, *model.optimizer.variables]
    return {
        "values": [np.asarray(v).tobytes() for v in variables],
        "names": [v.path for v in variables],
        "metrics": [v.path for v in model.metrics_variables],
        "losses": [np.asarray(loss).tobytes() for loss in model.losses],
        "attributes": [set(vars(each)) for each in model._flatten_layers()],
        "of_optimizer": set(vars(model.optimizer)),
        "random": get_random_state(),
    }


@pytest.mark.parametrize("has_drawn", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_model_and_the_random_state_are_bit_for_bit_as_before(
    replicas, has_drawn, mirrored
):
    keras.config.set_dtype_policy("mixed_float16")
    x, y = np.ones((4, 8), "float32"), np.ones((4, 8), "float32")
    with mirrored(replicas).scope():
        model = Noisy()
        model(x)
        model.compile(
            tfamp.wrap_optimizer("adam"),
            loss="mse",
            metrics=["mae"],
            auto_scale_loss=False,
        )
    if not has_drawn:
        # Nothing has drawn without a seed since.
        keras.utils.set_random_seed(1)
    before = state_of(model)
    assert (before["random"]["keras"] is None) == (not has_drawn)
    assert before["losses"]
    found = lint(model, (x, y))
    # An activity regularizer is a sum, of which the step says nothing.
    unknown = {"unknown-reduction"} if replicas > 1 else set()
    assert {each.rule for each in found} == {"rounded-loss"} | unknown
    assert {each.layer for each in found} == {"", model.dense.name}
    assert state_of(model) == before


@pytest.mark.slow
def test_a_looked_at_model_trains_as_one_that_was_not():
    def trained(is_looked_at):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((8,))
        x = layers.Dropout(0.5)(layers.Dense(8)(inputs))
        model = keras.Model(inputs, layers.Dense(2)(x))
        model.compile("adam", loss="mse", metrics=["mae"])
        data = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")
        if is_looked_at:
            lint(model, (data[:8], data[:8, :2]))
        model.fit(data, data[:, :2], batch_size=8, verbose=0)
        return np.concatenate([w.ravel() for w in model.get_weights()])

    np.testing.assert_array_equal(trained(True), trained(False))
