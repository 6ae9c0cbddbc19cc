"""Models and losses drawn at random, against one device in float64."""

import contextlib
import random

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import first_always

WORDS, CLASSES = 9, 4
LOSSES = (
    "mean_squared_error",
    "huber",
    "cross_entropy",
    "ignore_class",
    "mean_with_sample_weight",
    "sum",
    "own mean",
    "own sum",
)


def own_mean(y, outputs):
    return keras.ops.mean(keras.ops.square(outputs - y))


def own_sum(y, outputs):
    return keras.ops.sum(keras.ops.square(outputs - y))


class Penalty(keras.layers.Layer):
    def __init__(self, reduce, **options):
        super().__init__(**options)
        self.reduce = reduce

    def call(self, x):
        self.add_loss(0.1 * self.reduce(keras.ops.square(x)))
        return x


def draw(seed):
    """A case: what the model is, how it is trained, and a batch."""
    choose = random.Random(seed)
    numbers = np.random.default_rng(seed)
    rows, tokens = choose.randint(2, 9), choose.randint(1, 5)
    loss = choose.choice(LOSSES)
    is_own = loss.startswith("own")
    case = {
        "loss": loss,
        "is_masked": not is_own and choose.random() < 0.5,
        "width": choose.randint(2, 5),
        "has_norm": choose.random() < 0.5,
        "is_recurrent": choose.random() < 0.2,
        "penalty": choose.choice([None, "mean", "sum"]),
        "regularizer": choose.choice([None, "l2"]),
        "replicas": choose.choice([1, 2, 3]),
        "microbatches": choose.choice([1, 2, 3]),
        "tokens": tokens,
    }
    ids = numbers.integers(0, 3, (rows, tokens)) * numbers.integers(
        1, 5, (rows, tokens)
    )
    y = numbers.standard_normal((rows, tokens, CLASSES)).astype("float32")
    if loss in ("cross_entropy", "ignore_class"):
        y = numbers.integers(0, CLASSES, (rows, tokens))
    if loss == "ignore_class":
        y = np.where(numbers.random((rows, tokens)) < 0.4, -1, y)
    batch = [ids.astype("int32"), y]
    weights = choose.choice([None, "rows", "tokens"])
    if weights and not is_own:
        shape = (rows, tokens if weights == "tokens" else 1)
        batch.append(numbers.uniform(0, 2, shape).astype("float32"))
    return case, tuple(batch)


def build(case, dtype):
    make = keras.losses
    loss = {
        "mean_squared_error": make.MeanSquaredError(dtype=dtype),
        "huber": make.Huber(dtype=dtype),
        "cross_entropy": make.SparseCategoricalCrossentropy(
            from_logits=True, dtype=dtype
        ),
        "ignore_class": make.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=-1, dtype=dtype
        ),
        "mean_with_sample_weight": make.MeanSquaredError(
            reduction="mean_with_sample_weight", dtype=dtype
        ),
        "sum": make.MeanSquaredError(reduction="sum", dtype=dtype),
        "own mean": own_mean,
        "own sum": own_sum,
    }[case["loss"]]
    inputs = keras.Input([case["tokens"]], dtype="int32")
    x = keras.layers.Embedding(
        WORDS, case["width"], mask_zero=case["is_masked"]
    )(inputs)
    if case["is_recurrent"]:
        x = keras.layers.SimpleRNN(3, return_sequences=True)(x)
    x = keras.layers.Dense(
        case["width"],
        activation="tanh",
        kernel_regularizer=case["regularizer"],
    )(x)
    if case["has_norm"]:
        x = keras.layers.LayerNormalization()(x)
    if case["penalty"]:
        layer = Penalty(getattr(keras.ops, case["penalty"]))
        layer.supports_masking = True
        x = layer(x)
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(x))
    model.compile(keras.optimizers.SGD(0.5), loss=loss)
    return model


@contextlib.contextmanager
def policy(dtype):
    """float64 is no precision of tfamp, but that of the reference."""
    before = keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(before)


def reference(case, batch, weights):
    """Update and loss of the whole batch on one device in float64."""
    with policy("float64"):
        model = build(case, "float64")
        model.set_weights(weights)
        x, y, sample_weight = (*batch, None)[:3]
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = model.compute_loss(x, y, outputs, sample_weight)
        variables = [v.value for v in model.trainable_variables]
        gradients = tape.gradient(loss, variables)
        return float(loss), [
            0.5 * tf.convert_to_tensor(gradient).numpy()
            for gradient in gradients
        ]


def check(seed, mirrored):
    case, batch = draw(seed)
    with mirrored(case["replicas"]).scope():
        model = build(case, "float32")
    before = model.get_weights()
    loss, updates = reference(case, batch, before)
    data = tf.data.Dataset.from_tensor_slices(batch).batch(len(batch[0]))
    # Its size is unknown, so that any is split.
    history = tfamp.fit(
        model, data, microbatches=case["microbatches"], verbose=0
    )
    largest = max(np.abs(update).max() for update in updates)
    for value, start, update in zip(
        model.get_weights(), before, updates, strict=True
    ):
        difference = np.abs((start - value) - update).max()
        # Of the weights, of size 1, float32 keeps so much.
        assert difference < 1e-5 * largest + 1e-6, (case, difference)
    assert history.history["loss"][0] == pytest.approx(loss, rel=1e-5), case


@pytest.mark.parametrize("seed", first_always(range(2), 1))
def test_a_drawn_model_trains_as_on_one_device_in_float64(seed, mirrored):
    check(seed, mirrored)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 200))
def test_200_drawn_models_train_as_on_one_device_in_float64(seed, mirrored):
    check(seed, mirrored)
