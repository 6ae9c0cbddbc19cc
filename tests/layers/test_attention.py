"""Lean attention: Keras's numbers, in less memory."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from packaging.version import Version

import tfamp
from tests.conftest import FLOAT32_ROUNDING
from tfamp.layers.attention import dot_product_attention

B, T, S, N, H = 2, 5, 7, 3, 4
DTYPES = ("float32", "bfloat16", "float16")


def keys_seen():
    seen = np.random.default_rng(1).random((B, 1, T, S)) > 0.4
    # A query that sees nothing, such as padding.
    seen[0, 0, 2] = False
    return tf.constant(seen)


CASES = {
    "plain": dict,
    "causal": lambda: {"is_causal": True},
    "masked": lambda: {"mask": keys_seen(), "scale": 0.3},
    "causal and masked": lambda: {"mask": keys_seen(), "is_causal": True},
}


def draw(dtype, heads=(N, N)):
    random = np.random.default_rng(0)
    shapes = [
        (B, T, heads[0], H),
        (B, S, heads[1], H),
        (B, S, heads[1], H),
        (B, T, heads[0], H),
    ]
    return [tf.cast(2 * random.normal(size=shape), dtype) for shape in shapes]


def passes(attend, query, key, value, upstream):
    inputs = (query, key, value)
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            outputs = attend(*inputs)
        gradients = inner.gradient(outputs, inputs, upstream)
        penalty = sum(
            tf.reduce_sum(tf.square(tf.cast(each, tf.float64)))
            for each in gradients
        )
    return [outputs, *gradients], outer.gradient(penalty, inputs)


def error(actual, exact):
    """Distance relative to the size of what is right."""
    difference = tf.cast(actual, tf.float64) - exact
    return float(tf.norm(difference) / tf.norm(exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_results_are_as_near_to_float64_as_those_of_keras(name, dtype):
    options = CASES[name]()

    def of_keras(*inputs):
        return keras.ops.dot_product_attention(*inputs, **options)

    def lean(*inputs):
        return dot_product_attention(*inputs, **options)

    inputs = draw(dtype)
    exact, exact_seconds = passes(
        of_keras, *(tf.cast(each, tf.float64) for each in inputs)
    )
    stock, stock_seconds = passes(of_keras, *inputs)
    fast, fast_seconds = passes(lean, *inputs)
    for values in zip(fast, stock, exact, strict=True):
        assert values[0].dtype == dtype
        assert error(values[0], values[2]) <= (
            1.25 * error(values[1], values[2]) + 1e-6
        )
    for values in zip(fast_seconds, stock_seconds, exact_seconds, strict=True):
        # The parts of one gradient are 16-bit before they are added.
        assert error(values[0], values[2]) <= (
            1.25 * error(values[1], values[2])
            + tfamp.FORMATS[dtype].epsilon / 8
        )


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_graphs_of_unknown_sizes_agree_with_eager(jit):
    inputs = draw("float32")

    def run(*x):
        return passes(lambda *y: dot_product_attention(*y, is_causal=True), *x)[
            0
        ]

    traced = tf.function(
        run,
        input_signature=[tf.TensorSpec((None, None, N, H))] * 4,
        jit_compile=jit,
    )
    for one, other in zip(traced(*inputs), run(*inputs), strict=True):
        # XLA has another exponential function.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_only_the_16_bit_scores_of_all_pairs_are_kept():
    bounds = []

    @tf.function
    def step(query, key, value, upstream):
        graph = tf.compat.v1.get_default_graph()
        with tf.GradientTape() as tape:
            tape.watch((query, key, value))
            y = dot_product_attention(query, key, value, is_causal=True)
        bounds.append(len(graph.get_operations()))
        return tape.gradient(y, (query, key, value), upstream)

    graph = step.get_concrete_function(*draw("bfloat16")).graph
    operations = graph.get_operations()
    forward = operations[: bounds[-1]]
    kept = {
        tensor.name: tensor.dtype
        for op in operations[bounds[-1] :]
        for tensor in op.inputs
        if tensor.op in forward and tensor.shape == (B, N, T, S)
    }
    assert list(kept.values()) == [tf.bfloat16]
    # Else the softmax would be merged with that of the forward pass, and kept.
    assert all(
        op.control_inputs
        for op in operations[bounds[-1] :]
        if any(tensor.name in kept for tensor in op.inputs)
    )


@pytest.mark.skipif(
    Version(keras.__version__) < Version("3.15"),
    reason="Keras's own fails on a CPU",
)
def test_grouped_heads_are_left_to_keras():
    *inputs, _ = draw("float32", heads=(4, 2))
    np.testing.assert_array_equal(
        dot_product_attention(*inputs),
        keras.ops.dot_product_attention(*inputs),
    )


def test_symbolic_inputs_make_a_model():
    query = keras.Input((T, N, H))
    outputs = dot_product_attention(query, query, query, is_causal=True)
    model = keras.Model(query, outputs)
    x = draw("float32")[0]
    np.testing.assert_allclose(
        model(x),
        dot_product_attention(x, x, x, is_causal=True),
        **FLOAT32_ROUNDING,
    )
