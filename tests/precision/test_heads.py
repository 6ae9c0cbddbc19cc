"""An output in float32 is a float32 number, not a rounded one."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests import matmul_dtypes
from tests.conftest import first_always
from tfamp.precision import heads
from tfamp.precision.keep_float32 import keep_float32
from tfamp.precision.policy import precision_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
X = np.random.default_rng(0).normal(size=(4, 3, 8)).astype("float32")
# Beyond float16, and to bfloat16 the same as 249,856.
OFFSET = 250_001.0
BIAS = keras.initializers.Constant(OFFSET)


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def dtype(request):
    keras.config.set_dtype_policy(request.param)
    return request.param.removeprefix("mixed_")


HEADS = {
    "dense": lambda: [layers.Dense(2, bias_initializer=BIAS)],
    "reshaped": lambda: [
        layers.Dense(2, bias_initializer=BIAS),
        layers.Reshape((6,)),
    ],
    "convolution": lambda: [layers.Conv1D(2, 2, bias_initializer=BIAS)],
    "per step": lambda: [
        layers.TimeDistributed(layers.Dense(2, bias_initializer=BIAS))
    ],
    "einsum": lambda: [
        layers.EinsumDense(
            "abc,cd->abd", (3, 2), bias_axes="d", bias_initializer=BIAS
        )
    ],
}


def products(model):
    graph = tf.function(model).get_concrete_function(X).graph
    return {
        tf.as_dtype(node.attr["T"].type).name
        for node in graph.as_graph_def().node
        if node.op in matmul_dtypes.PRODUCTS
    }


@pytest.mark.parametrize("is_large", first_always([False, True], 1))
@pytest.mark.parametrize("name", HEADS)
def test_prices_are_told_apart(name, is_large, dtype, tmp_path, monkeypatch):
    if is_large:
        monkeypatch.setattr(heads, "_FEW_WEIGHTS", 0)
    model = keras.Sequential([keras.Input((3, 8)), *HEADS[name]()])
    keep_float32(model)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    with_zero_bias = [
        np.zeros_like(weight) if (weight == OFFSET).all() else weight
        for weight in model.get_weights()
    ]
    bare = keras.Sequential.from_config(model.get_config())
    bare.set_weights(with_zero_bias)
    expected = bare(X).numpy().astype("float64") + OFFSET
    for each in (model, loaded):
        result = each(X)
        assert result.dtype == tf.float32
        # The bias is added in float32, which holds 1/64 there.
        np.testing.assert_allclose(result, expected, atol=1 / 32, rtol=0)
        assert products(each) == {dtype if is_large else "float32"}
    assert precision_of(model) == (f"mixed_{dtype}" if is_large else "float32")
    assert not [each for each in keep_float32(loaded) if each.changed]


def test_scores_keep_their_product_in_16_bits(dtype):
    model = keras.Sequential([keras.Input((3, 8)), layers.Dense(2, "softmax")])
    assert str(keep_float32(model)[0]) == f"{model.layers[0].name}: " + (
        "output in float32, its matrix product in 16 bits"
    )
    assert products(model) == {dtype}


def test_a_tied_vocabulary_is_multiplied_in_16_bits(dtype, monkeypatch):
    monkeypatch.setattr(heads, "_FEW_WEIGHTS", 0)
    tokens = keras.Input((3,), dtype="int32")
    embedding = layers.ReversibleEmbedding(20, 8)
    hidden = layers.Dense(8)(embedding(tokens))
    model = keras.Model(tokens, embedding(hidden, reverse=True))
    ids = np.zeros((2, 3), "int32")
    keep_float32(model)
    assert model(ids).dtype == tf.float32
    graph = tf.function(model).get_concrete_function(ids).graph
    assert {
        tf.as_dtype(node.attr["T"].type).name
        for node in graph.as_graph_def().node
        if node.op in matmul_dtypes.PRODUCTS
    } == {dtype}
