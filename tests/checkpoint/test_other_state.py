"""What draws or counts beside Keras's variables goes on too, or is named."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfamp.checkpoint import other_state
from tfamp.checkpoint.first_batches import FirstBatches


class Draws(keras.layers.Layer):
    """Holds a generator, a counter and others in a dict."""

    def __init__(self, draw=None):
        super().__init__()
        self.generator = tf.random.Generator.from_seed(1)
        self.counts = {"calls": tf.Variable(0), "list": [tf.Variable(1.0)]}
        self.draw = draw or (lambda: self.generator.normal([]))

    def call(self, x):
        return x + self.draw()


def build(draw=None):
    layers = [keras.Input((1,)), Draws(draw), keras.layers.Dense(1)]
    return keras.Sequential(layers)


def test_generators_and_variables_of_layers_go_on(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        model, other = build(), build()

    @tf.function
    def draw(layer):
        return strategy.run(lambda: layer.generator.normal([3]))

    def drawn(model):
        values = strategy.experimental_local_results(draw(model.layers[0]))
        return [value.numpy() for value in values]

    first = drawn(model)
    model.layers[0].counts["calls"].assign(7)
    arrays = []
    saved = other_state.capture(model, arrays)
    expected = drawn(model)
    other_state.restore(other, saved, arrays)
    np.testing.assert_array_equal(drawn(other), expected)
    assert (np.array(first) != expected).all()
    assert other.layers[0].counts["calls"].numpy() == 7


def test_the_global_generator_goes_on():
    model, arrays = build(), []
    tf.random.set_global_generator(tf.random.Generator.from_seed(5))
    try:
        saved = other_state.capture(model, arrays)
        expected = tf.random.get_global_generator().normal([3]).numpy()
        tf.random.set_global_generator(tf.random.Generator.from_seed(6))
        other_state.restore(model, saved, arrays)
        drawn = tf.random.get_global_generator().normal([3]).numpy()
        np.testing.assert_array_equal(drawn, expected)
    finally:
        tf.random.set_global_generator(None)


@pytest.mark.parametrize(
    ("draw", "is_named"),
    [
        (lambda: tf.random.normal([]), True),
        (lambda: tf.random.shuffle([1.0, 2.0])[0], True),
        (lambda: tf.random.stateless_normal([], (1, 2)), False),
        (lambda: keras.random.normal(()), False),
        (None, False),
    ],
)
def test_what_draws_from_tf_random_is_named(draw, is_named, warnings_of_absl):
    model = build(draw)

    @tf.function
    def step(x):
        # As steps are: in a loop, in a function of its own.
        return tf.while_loop(
            lambda i, y: i < 2,
            lambda i, y: (i + 1, tf.function(model)(y)),
            [0, x],
        )

    graph = step.get_concrete_function(tf.ones((2, 1))).graph
    other_state.warn_of_draws(graph, model)
    said = [line for line in warnings_of_absl if line.startswith("Layer draws")]
    assert len(said) == is_named


class TestFirstBatches:
    def read(self, dataset, *, batches, passes=1):
        first = FirstBatches()
        watched = first.watched(dataset)
        for _ in range(passes):
            list(watched.take(batches))
        return first

    @pytest.mark.parametrize(
        "make",
        [
            lambda x: x,
            lambda x: (x,),
            lambda x: (x, {"a": tf.cast(x, tf.bfloat16)}),
            lambda x: {"s": tf.strings.as_string(x)},
            lambda x: tf.RaggedTensor.from_row_lengths(x, [1]),
        ],
    )
    def test_batches_stay_what_they_are(self, make):
        dataset = tf.data.Dataset.range(6).batch(1).map(make)
        watched = FirstBatches().watched(dataset)
        assert watched.element_spec == dataset.element_spec
        assert watched.cardinality() == 6
        for one, other in zip(watched, dataset, strict=True):
            for a, b in zip(
                tf.nest.flatten(one, expand_composites=True),
                tf.nest.flatten(other, expand_composites=True),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b)

    def test_another_order_is_said(self, warnings_of_absl):
        def make(seed):
            # Anew: each pass leaves its mark on a dataset that shuffles.
            return tf.data.Dataset.range(64).shuffle(64, seed=seed).batch(8)

        saved = self.read(make(1), batches=3, passes=2).notes()
        assert saved["run"] != saved["pass"]
        again = self.read(make(1), batches=3, passes=2)
        again.compare(saved, passes=1, steps=3)
        self.read(make(1), batches=1).compare(saved, passes=2, steps=0)
        assert not warnings_of_absl
        self.read(make(2), batches=1).compare(saved, passes=2, steps=0)
        again = self.read(make(2), batches=3, passes=2)
        again.compare(saved, passes=1, steps=3)
        assert len(warnings_of_absl) == 2
        assert "come in another order" in warnings_of_absl[0]
