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
    """A case: what the model is, how it is trained, and its batches."""
    choose = random.Random(seed)
    numbers = np.random.default_rng(seed)
    sizes = [(choose.randint(2, 9), choose.randint(1, 5))]
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
    }
    weights = choose.choice([None, "rows", "tokens"])
    if choose.random() < 0.5:
        # Another step of the same graph call, of a size of its own.
        sizes.append((choose.randint(1, 9), choose.randint(1, 5)))
    weights = None if is_own else weights
    return case, [_batch(loss, weights, *size, numbers) for size in sizes]


def _batch(loss, weights, rows, tokens, numbers):
    ids = numbers.integers(0, 3, (rows, tokens)) * numbers.integers(
        1, 5, (rows, tokens)
    )
    y = numbers.standard_normal((rows, tokens, CLASSES)).astype("float32")
    if loss in ("cross_entropy", "ignore_class"):
        y = numbers.integers(0, CLASSES, (rows, tokens))
    if loss == "ignore_class":
        y = np.where(numbers.random((rows, tokens)) < 0.4, -1, y)
    batch = [ids.astype("int32"), y]
    if weights:
        shape = (rows, tokens if weights == "tokens" else 1)
        batch.append(numbers.uniform(0, 2, shape).astype("float32"))
    return tuple(batch)


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
    inputs = keras.Input([None], dtype="int32")
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


def reference(case, batches, weights):
    """Updates and loss of whole batches on one device in float64."""
    with policy("float64"):
        model = build(case, "float64")
        model.set_weights(weights)
        losses = []
        for batch in batches:
            x, y, sample_weight = (*batch, None)[:3]
            with tf.GradientTape() as tape:
                outputs = model(x, training=True)
                loss = model.compute_loss(x, y, outputs, sample_weight)
            losses.append(float(loss))
            variables = [v.value for v in model.trainable_variables]
            gradients = tape.gradient(loss, variables)
            for variable, gradient in zip(variables, gradients, strict=True):
                variable.assign_sub(0.5 * tf.convert_to_tensor(gradient))
        updates = [
            before - after
            for before, after in zip(weights, model.get_weights(), strict=True)
        ]
        rows = [len(batch[0]) for batch in batches]
        return np.average(losses, weights=rows), updates


def check(seed, mirrored):
    case, batches = draw(seed)
    with mirrored(case["replicas"]).scope():
        model = build(case, "float32")
    before = model.get_weights()
    loss, updates = reference(case, batches, before)
    # Their sizes are unknown, so that any is split.
    data = tf.data.Dataset.from_generator(
        lambda: iter(batches),
        output_signature=tuple(
            tf.TensorSpec([None] * part.ndim, part.dtype) for part in batches[0]
        ),
    )
    history = tfamp.fit(
        model,
        data,
        microbatches=case["microbatches"],
        steps_per_loop=2,
        verbose=0,
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
