"""Cross-entropy by a softmax: TensorFlow's numbers, and its errors."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import FLOAT32_ROUNDING, mostly_long
from tfamp.distribute.strategy import Share
from tfamp.layers.cross_entropy import sparse_cross_entropy
from tfamp.step import build

CLASSES = 100
of_tensorflow = tf.nn.sparse_softmax_cross_entropy_with_logits


def draw(shape=(3, 5), classes=CLASSES, dtype="float32", label_dtype="int64"):
    random = np.random.default_rng(0)
    logits = 5 * random.normal(size=(*shape, classes))
    labels = random.integers(classes, size=shape)
    return tf.constant(labels, label_dtype), tf.constant(logits, dtype)


def derivatives(function, labels, logits):
    """Values, the gradient of their squares, and a second derivative."""
    with tf.GradientTape() as outer:
        outer.watch(logits)
        with tf.GradientTape() as inner:
            inner.watch(logits)
            losses = function(labels, logits)
            total = tf.reduce_sum(losses**2)
        gradient = inner.gradient(total, logits)
        curved = tf.reduce_sum(tf.sin(gradient))
    return losses, gradient, outer.gradient(curved, logits)


@pytest.mark.parametrize(
    ("graph", "shape", "label_dtype"),
    mostly_long(
        itertools.product(
            (False, True), ((7,), (3, 5), (0,)), ("int32", "int64")
        ),
        always=[
            (False, (0,), "int32"),
            (False, (7,), "int64"),
            (True, (3, 5), "int64"),
        ],
    ),
)
def test_values_and_derivatives_are_those_of_tensorflow(
    shape, label_dtype, graph
):
    data = draw(shape, label_dtype=label_dtype)
    run = tf.function(derivatives) if graph else derivatives
    found = run(sparse_cross_entropy, *data)
    for ours, theirs in zip(
        found, derivatives(of_tensorflow, *data), strict=True
    ):
        assert ours.dtype == theirs.dtype
        # Losses reach 30, and what is derived from them the same.
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=5e-5)


def test_values_are_as_exact_as_float32_can_be():
    labels, logits = draw((200,))
    exact = of_tensorflow(labels, tf.cast(logits, "float64"))
    np.testing.assert_allclose(
        sparse_cross_entropy(labels, logits), exact, rtol=3e-6
    )


def test_beside_large_logits_the_loss_is_not_lost():
    logits = tf.fill([2, CLASSES], 1e30)
    np.testing.assert_allclose(
        sparse_cross_entropy(tf.constant([0, 9]), logits), np.log(CLASSES)
    )


def test_classes_that_cannot_be_and_nans_cost_what_they_cost_elsewhere():
    labels, logits = draw((3,))
    spoiled = logits.numpy()
    spoiled[0, (labels[0] + 1) % CLASSES] = -np.inf
    spoiled[1, labels[1]] = -np.inf
    spoiled[2, 5] = np.nan
    losses = sparse_cross_entropy(labels, tf.constant(spoiled)).numpy()
    expected = of_tensorflow(labels, tf.constant(spoiled)).numpy()
    assert np.isfinite(losses[0])
    assert np.isinf(losses[1])
    np.testing.assert_allclose(losses, expected, **FLOAT32_ROUNDING)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(10, "float32"), (CLASSES, "float64")]
)
def test_few_classes_and_other_dtypes_are_left_to_tensorflow(classes, dtype):
    labels, logits = draw(classes=classes, dtype=dtype)
    ours = sparse_cross_entropy(labels, logits)
    np.testing.assert_array_equal(ours, of_tensorflow(labels, logits))
    assert ours.dtype == dtype


def classifier():
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(CLASSES)])
    model.compile(
        optimizer=tfamp.wrap_optimizer(keras.optimizers.SGD(0.5)),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=3
        ),
        auto_scale_loss=False,
    )
    return model


def examples(labels=CLASSES):
    random = np.random.default_rng(0)
    x = random.normal(size=(24, 4)).astype("float32")
    y = random.integers(labels, size=24)
    y[::5] = 3
    weights = random.random(24).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(8)


@pytest.mark.parametrize("jit", [False, True])
def test_a_traced_step_computes_it_and_leaves_tensorflow_as_it_was(jit):
    model = classifier()
    model.optimizer.build(model.trainable_variables)
    step = build.train_step(model, tf.distribute.get_strategy(), 1, jit)
    batch = next(iter(examples()))
    rows = tf.constant(8, tf.int64)
    traced = tf.function(lambda: step(Share(batch, rows, rows)))
    graph = traced.get_concrete_function().graph.as_graph_def()
    operations = {
        node.op
        for nodes in (graph.node, *(f.node_def for f in graph.library.function))
        for node in nodes
    }
    is_original = "SparseSoftmaxCrossEntropyWithLogits" in operations
    # XLA fuses the original by itself.
    assert is_original == jit
    assert tf.nn.sparse_softmax_cross_entropy_with_logits is of_tensorflow


def test_training_with_it_moves_weights_as_keras_does():
    ours, theirs = classifier(), classifier()
    theirs.set_weights(ours.get_weights())
    before = ours.get_weights()
    tfamp.fit(ours, examples(), epochs=1, verbose=0)
    theirs.fit(examples(), epochs=1, shuffle=False, verbose=0)
    for mine, stock, old in zip(
        ours.get_weights(), theirs.get_weights(), before, strict=True
    ):
        assert np.abs(mine - old).max() > 1e-3
        np.testing.assert_allclose(mine, stock, rtol=1e-5, atol=1e-6)


def test_a_label_that_is_no_class_is_named_in_one_line():
    wrong = examples().map(lambda x, y, w: (x, y + 7 * CLASSES, w))
    with pytest.raises(
        tfamp.InputError,
        match=r"^Received a label value of \d+ which is outside the valid "
        r"range of \[0, 100\)$",
    ):
        tfamp.fit(classifier(), wrong, epochs=1, verbose=0)
