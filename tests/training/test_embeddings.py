"""Gradients that are rows of a table, of another number in each step."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import mostly_long
from tfamp.distribute import table_rows

WORDS, WIDTH = 9, 3


def batches(lengths, sizes, dtype):
    """A dataset of token ids and targets: a batch for each length and size."""
    random = np.random.default_rng(0)
    made = [
        (
            random.integers(0, WORDS, (size, length)).astype("int32"),
            random.standard_normal((size, 2)).astype(dtype),
        )
        for length, size in zip(lengths, sizes, strict=True)
    ]
    return tf.data.Dataset.from_generator(
        lambda: iter(made),
        output_signature=(
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None, 2], dtype),
        ),
    ).apply(tf.data.experimental.assert_cardinality(len(made)))


class Lookup(layers.Layer):
    """A table of the user's own, read by `tf.gather`."""

    def build(self, _):
        self.table = self.add_weight(shape=[WORDS, WIDTH], name="table")

    def call(self, ids):
        return tf.gather(tf.convert_to_tensor(self.table), ids)


class Product(Lookup):
    """The same table with a dense gradient.

    Keras adds up squares and norms of rows that name one word, not those of
    their sum.
    """

    def call(self, ids):
        return keras.ops.one_hot(ids, WORDS, dtype=self.dtype) @ self.table


LOOKUPS = {
    "Embedding": lambda **options: layers.Embedding(WORDS, WIDTH, **options),
    "Lookup": Lookup,
    "Product": Product,
}


class OwnStep(keras.Model):
    """Sums of gradients are left to its optimizer."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def build(table, dtype, optimizer, cls=keras.Model):
    keras.utils.set_random_seed(0)
    tokens = keras.Input([None], dtype="int32")
    lookup = LOOKUPS[table](dtype=dtype)
    x = layers.GlobalAveragePooling1D(dtype=dtype)(lookup(tokens))
    model = cls(tokens, layers.Dense(2, dtype=dtype)(x))
    model.compile(
        keras.optimizers.SGD(0.3, momentum=0.9)
        if optimizer == "SGD"
        else keras.optimizers.Adam(0.05, beta_2=0.9, epsilon=1e-3),
        "mse",
    )
    return model


# Of a batch: lengths and numbers of rows.
STEPS = {
    "a smaller last batch": ([5, 5, 5], [8, 8, 4]),
    "a last batch of one row": ([5, 5, 5], [8, 8, 1]),
    "lengths": ([2, 7, 4, 1], [8, 8, 8, 8]),
    "both": ([2, 7, 4, 4], [8, 6, 8, 2]),
}
# Of a training: the class of its model, and microbatches.
KINDS = {
    "plain": (keras.Model, 1),
    "in two pieces": (keras.Model, 2),
    "own step": (OwnStep, 1),
}


@pytest.mark.parametrize(
    ("steps", "table", "optimizer", "replicas", "kind", "small"),
    mostly_long(
        [
            (steps, table, optimizer, replicas, kind, small)
            for steps in STEPS
            for table in ("Embedding", "Lookup")
            for optimizer in ("SGD", "Adam")
            # Two have the collectives that GPUs use.
            for replicas in (2, 3)
            for kind in KINDS
            # No larger table crosses whole: then its rows do, 5 at a time.
            for small in (WORDS * WIDTH, 0)
        ],
        always=[
            ("a smaller last batch", "Embedding", "Adam", 2, "plain", 0),
            ("both", "Embedding", "SGD", 2, "in two pieces", WORDS * WIDTH),
            ("lengths", "Lookup", "SGD", 2, "plain", 0),
            ("lengths", "Embedding", "SGD", 2, "own step", WORDS * WIDTH),
            ("both", "Lookup", "Adam", 2, "own step", 0),
        ],
    ),
)
def test_any_number_of_rows_trains_as_keras_does_on_one_device(
    steps,
    table,
    optimizer,
    replicas,
    kind,
    small,
    mirrored,
    monkeypatch,
):
    cls, microbatches = KINDS[kind]
    monkeypatch.setattr(table_rows, "_SMALL", small)
    monkeypatch.setattr(table_rows, "_ROWS", 5)
    model = build("Product", "float64", optimizer)
    begin = [weight.astype("float32") for weight in model.get_weights()]
    model.set_weights(begin)
    model.fit(
        batches(*STEPS[steps], "float64"), epochs=2, shuffle=False, verbose=0
    )
    right = model.get_weights()

    with mirrored(replicas).scope():
        model = build(table, "float32", optimizer, cls)
        model.set_weights(begin)
    tfamp.fit(
        model,
        batches(*STEPS[steps], "float32"),
        epochs=2,
        verbose=0,
        microbatches=microbatches,
        # All in one graph call, where a collective takes one shape only.
        steps_per_loop=4,
    )

    for made, wanted in zip(model.get_weights(), right, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("cls", [keras.Model, OwnStep])
def test_a_table_in_16_bits_has_the_sum_of_all_replicas(cls, mirrored):
    # A row in each of 1,024 examples: bfloat16 would stall at 256.
    x = np.zeros((1024 + 512, 1), "int32")
    y = np.zeros((len(x), WIDTH), "float32")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(1024)
    keras.utils.set_random_seed(0)
    with mirrored(2).scope():
        tokens = keras.Input([1], dtype="int32")
        table = layers.Embedding(
            WORDS, WIDTH, embeddings_initializer="ones", dtype="bfloat16"
        )
        outputs = layers.Flatten(dtype="float32")(table(tokens))
        model = cls(tokens, outputs)
        model.compile(keras.optimizers.SGD(0.5), _linear)
    tfamp.fit(model, data, verbose=0, steps_per_loop=2)
    # Of each step the mean gradient is 1: from 1 to 0.5 and to 0.
    np.testing.assert_array_equal(np.asarray(table.embeddings[0]), 0)
    np.testing.assert_array_equal(np.asarray(table.embeddings[1]), 1)


def _linear(y, outputs):
    return keras.ops.sum(outputs - y, axis=-1)
