"""Traces are counted, told from XLA's, and leave nothing behind."""

import gc
import logging
import sys

import pytest
import tensorflow as tf

from tfamp import keras_internals


@pytest.mark.parametrize(
    ("make", "is_warned"),
    [(tf.function, True), (keras_internals.graph_function, False)],
)
def test_traces_of_one_code_are_counted_together(make, is_warned, caplog):
    def function_of(number):
        def function(x):
            return x + number

        return make(function)

    # A program that ran before may have made it say less.
    with caplog.at_level(logging.WARNING, logger="tensorflow"):
        sums = [int(function_of(i)(tf.constant(1))) for i in range(7)]
    assert sums == [1, 2, 3, 4, 5, 6, 7]
    assert ("retracing" in caplog.text) == is_warned


def test_what_is_traced_for_xla_is_known():
    def ask(x):
        inner = tf.cond(
            x > 0,
            lambda: tf.constant(keras_internals.is_compiled_by_xla()),
            lambda: tf.constant(False),
        )
        return tf.logical_and(inner, keras_internals.is_compiled_by_xla())

    one = tf.constant(1.0)
    assert not ask(one)
    assert not tf.function(ask)(one)
    assert tf.function(ask, jit_compile=True)(one)
    assert tf.function(tf.function(ask, jit_compile=True))(one)


def test_records_of_custom_gradients_go_with_the_trace_and_no_others():
    @tf.custom_gradient
    def tripled(x):
        return 3 * x, lambda upstream: 5 * upstream

    def gradient(x):
        def body(i, total):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.cond(x > 0, lambda: tripled(x), lambda: x)
            return i + 1, total + tape.gradient(y, x)

        return tf.while_loop(lambda i, _: i < 2, body, [0, 0.0])[1]

    def records():
        module = sys.modules["tensorflow.python.framework.ops"]
        found = module.gradient_registry._registry
        return {name for name in found if name.startswith("CustomGradient-")}

    inner = tf.function(tripled)
    before = records()
    kept = tf.function(lambda x: gradient(inner(x)))
    assert float(kept(tf.constant(1.0))) == 10.0
    of_others = records() - before
    assert len(of_others) >= 2

    @tf.function
    def dropping(x):
        with keras_internals.differentiated_within():
            return gradient(x) + gradient(inner(x))

    assert float(dropping(tf.constant(1.0))) == 20.0
    assert records() == before | of_others
    # That of a function within is there for whoever calls it next.
    with tf.GradientTape() as tape:
        x = tf.constant(1.0)
        tape.watch(x)
        y = inner(x)
    assert float(tape.gradient(y, x)) == 5.0


def test_records_are_dropped_while_garbage_collection_lets_others_add():
    registry = sys.modules[
        "tensorflow.python.framework.ops"
    ].gradient_registry._registry
    record = {"type": lambda: None, "location": ()}
    added, pairs = [], []

    def add(phase, info):
        added.append(f"CustomGradient-of-another-{len(added)}")
        registry[added[-1]] = record

    @tf.function(autograph=False)
    def dropping(x):
        with keras_internals.differentiated_within():
            y = x * 2
            # Python keeps some to use again, whose making collects nothing.
            pairs.extend((i, i) for i in range(10_000))
            gc.callbacks.append(add)
            gc.set_threshold(1)
            return y

    thresholds = gc.get_threshold()
    try:
        assert float(dropping(tf.constant(1.0))) == 2.0
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(add)
        for name in added:
            registry.pop(name, None)
    assert added
