"""How often a step is traced, which is most of the wait before the first."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import first_always, mostly_slow
from tfamp.distribute.new_variables import made_outside_of_graphs


class Traced(layers.Layer):
    """Counts how often Python runs its call in training."""

    count = 0

    def call(self, inputs, training=False):
        Traced.count += bool(training)
        return inputs


def compiled_model(strategy, **wrapping):
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([4]),
                layers.Dense(4, activation="relu"),
                Traced(),
                layers.Dropout(0.1),
                layers.Dense(1),
            ]
        )
        optimizer = tfamp.wrap_optimizer(keras.optimizers.Adam(), **wrapping)
        model.compile(optimizer, "mse", metrics=["mae"])
    return model


CASES = [
    ("float32", 1, {}, 1),
    ("mixed_float16", 1, {}, 1),
    # The forward pass once more: to see the loss, which is split.
    ("float32", 2, {}, 3),
    # And once more: to see which weights are read in 16 bits alone.
    ("mixed_bfloat16", 2, {"shard": True}, 4),
]


@pytest.mark.parametrize(
    ("precision", "replicas", "wrapping", "calls"),
    mostly_slow(CASES, always=[CASES[1]]),
)
def test_a_step_is_traced_once_for_each_replica(
    precision, replicas, wrapping, calls, mirrored
):
    tfamp.set_precision(precision)
    strategy = tf.distribute.get_strategy()
    if replicas > 1:
        strategy = mirrored(replicas)
    model = compiled_model(strategy, **wrapping)
    x = np.random.default_rng(0).random((24, 4), "float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(8)
    Traced.count = 0
    tfamp.fit(
        model,
        data,
        epochs=2,
        validation_data=data,
        keep_float32=False,
        verbose=0,
    )
    assert Traced.count == calls


@keras.saving.register_keras_serializable("tests")
class Straight(layers.Layer):
    """Rounds, with a gradient of its own."""

    def call(self, inputs):
        @tf.custom_gradient
        def rounded(x):
            return tf.round(x), lambda upstream: upstream

        return rounded(inputs)


CASES_OF_MEMORY = [
    ("mixed_float16", {"microbatches": 2}),
    ("float32", {"jit": True}),
    ("mixed_bfloat16", {}),
    ("float32", {"microbatches": 2}),
]


@pytest.mark.parametrize(
    ("precision", "options"), first_always(CASES_OF_MEMORY, 1)
)
def test_no_graph_is_left_of_fit_evaluate_and_predict(precision, options):
    tfamp.set_precision(precision)
    model = keras.Sequential(
        [
            keras.Input([4]),
            layers.Dense(4),
            layers.LayerNormalization(),
            Straight(),
            # TensorFlow's own cross-entropy has other arithmetic below 64.
            layers.Dense(80, dtype="float32"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    x = np.random.default_rng(0).random((8, 4), "float32")
    data = tf.data.Dataset.from_tensor_slices((x, np.arange(8))).batch(4)

    def graphs_left():
        tfamp.fit(model, data, verbose=0, keep_float32=False, **options)
        tfamp.evaluate(model, data)
        tfamp.predict(model, data)
        gc.collect()
        return [each for each in gc.get_objects() if _is_graph(each)]

    graphs_left()
    number = len(graphs_left())
    assert len(graphs_left()) <= number


def _is_graph(value) -> bool:
    # Some proxies raise where they are asked for their class.
    return issubclass(type(value), tf.Graph)


def test_what_is_made_sees_no_graph_and_its_error_is_raised():
    @tf.function
    def traced():
        made = made_outside_of_graphs(tf.executing_eagerly)
        with pytest.raises(ZeroDivisionError):
            made_outside_of_graphs(lambda: 1 // 0)
        return made

    assert traced()
