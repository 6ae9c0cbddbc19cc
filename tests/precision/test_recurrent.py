"""What is carried from step to step is carried in float32."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfamp
from tests import matmul_dtypes
from tests.conftest import mostly_long
from tfamp.precision.keep_float32 import keep_float32
from tfamp.precision.policy import precision_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
STEPS = 300
ROUNDED = 256
ONES = np.ones((1, STEPS, 1), "float32")


class CounterCell(layers.Layer):
    """Somebody else's cell: adds its input to its state."""

    state_size = 1

    def build(self, shape):
        self.factor = self.add_weight(shape=(1, 1), initializer="ones")

    def call(self, x, states):
        total = states[0] + ops.matmul(x, self.factor)
        return total, [total]


def counter():
    return layers.SimpleRNN(
        1,
        activation="relu",
        kernel_initializer="ones",
        recurrent_initializer="identity",
    )


def gates_open():
    """An LSTM that adds tanh(30) = 1 to its cell state in each step."""

    def constant(*values):
        return lambda shape, dtype=None: ops.reshape(
            ops.convert_to_tensor(values, dtype), shape
        )

    return layers.LSTM(
        1,
        activation="linear",
        recurrent_initializer="zeros",
        kernel_initializer=constant(0.0, 0.0, 1.0, 0.0),
        bias_initializer=constant(30.0, 30.0, 0.0, 30.0),
        unit_forget_bias=False,
    )


class Scan(layers.Layer):
    """A loop of somebody else's over time."""

    def call(self, x):
        x = ops.transpose(x, (1, 0, 2))
        return ops.scan(lambda c, y: (c + y, y), x[0] * 0, x)[0]


class While(layers.Layer):
    def call(self, x):
        def body(i, total):
            return i + 1, total + x[:, i]

        return ops.while_loop(
            lambda i, total: i < STEPS, body, (0, x[:, 0] * 0)
        )[1]


class Fori(layers.Layer):
    def call(self, x):
        return ops.fori_loop(
            0, STEPS, lambda i, total: total + x[:, i], x[:, 0] * 0
        )


class Fold(layers.Layer):
    def call(self, x):
        x = tf.transpose(x, (1, 0, 2))
        return tf.foldl(lambda total, y: total + y, x, x[0] * 0)


COUNTERS = {
    "SimpleRNN": counter,
    "LSTM": gates_open,
    "own cell": lambda: layers.RNN(CounterCell()),
    "stacked": lambda: layers.RNN([CounterCell()]),
    "Bidirectional": lambda: layers.Bidirectional(counter(), merge_mode="ave"),
    "scan": Scan,
    "while_loop": While,
    "fori_loop": Fori,
    "tf.foldl": Fold,
}


def products_of(graph):
    """The dtypes of the matrix products of a graph, loops included."""
    definition = graph.as_graph_def()
    nodes = [
        *definition.node,
        *(n for f in definition.library.function for n in f.node_def),
    ]
    return {
        tf.as_dtype(node.attr["T"].type).name
        for node in nodes
        if node.op in matmul_dtypes.PRODUCTS
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    mostly_long(
        COUNTERS, always=["SimpleRNN", "LSTM", "own cell", "scan", "while_loop"]
    ),
)
def test_a_bfloat16_count_goes_on_beyond_256(name):
    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input((STEPS, 1), batch_size=1)
    layer = COUNTERS[name]()
    head = layers.Dense(1, "softplus", kernel_initializer="ones")
    model = keras.Model(inputs, head(layer(inputs)))
    keep_float32(model)
    # 300 is itself a number of bfloat16, where the next are 2 apart.
    np.testing.assert_allclose(tf.function(model)(ONES), [[STEPS]])
    keep_float32(model, operations=False)
    np.testing.assert_allclose(tf.function(model)(ONES), [[ROUNDED]])


@pytest.mark.slow
def test_products_of_a_recurrent_layer_stay_in_16_bits_and_files_keep_all(
    tmp_path,
):
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((2, 3))
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(inputs)
    x = layers.RNN([layers.GRUCell(4), layers.LSTMCell(2)])(x)
    assert x.dtype == "float16"
    model = keras.Model(inputs, layers.Dense(2, "softmax")(x))
    assert [each.changed for each in keep_float32(model)] == [True] * 3
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    batch = np.random.default_rng(0).normal(size=(2, 2, 3)).astype("float32")
    np.testing.assert_array_equal(loaded(batch), model(batch))
    assert not [each for each in keep_float32(loaded) if each.changed]
    graph = tf.function(loaded).get_concrete_function(batch).graph
    assert products_of(graph) == {"float16"}


@pytest.mark.parametrize(
    "name",
    mostly_long(
        ["SimpleRNN", "LSTM", "own cell", "stacked", "Bidirectional"],
        always=["LSTM", "own cell"],
    ),
)
def test_what_is_said_of_its_products_is_true_of_a_recurrent_layer(name):
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = COUNTERS[name]()
    inputs = keras.Input((2, 1), batch_size=1)
    model = keras.Model(inputs, layers.Dense(1)(layer(inputs)))
    kept = {each.path: each.reason for each in keep_float32(model)}[layer.name]
    graph = tf.function(model.layers[1]).get_concrete_function(ONES[:, :2])
    assert products_of(graph.graph) == (
        {"bfloat16"} if "of gates in 16 bits" in kept else {"float32"}
    )
    # Said again, and as an output, it is the same.
    (again,) = [e for e in keep_float32(model) if e.path == layer.name]
    assert (again.reason, again.changed) == (kept, False)
    (alone,) = keep_float32(keras.Model(inputs, COUNTERS[name]()(inputs)))
    assert alone.reason == f"output and {kept}"


def test_states_that_are_returned_are_not_rounded():
    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input((STEPS, 1), batch_size=1)
    rnn = layers.SimpleRNN(
        1,
        activation="relu",
        kernel_initializer="ones",
        recurrent_initializer="identity",
        return_state=True,
        stateful=True,
    )
    output, state = rnn(inputs)
    model = keras.Model(inputs, [layers.Dense(1)(output), state])
    keep_float32(model)
    run = tf.function(lambda x: model(x)[1])
    for calls in (1, 2):
        assert float(run(ONES)[0, 0]) == calls * STEPS


def test_a_file_is_loaded_in_another_precision_products_included(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((2, 3))
    model = keras.Model(inputs, layers.Dense(1)(layers.LSTM(4)(inputs)))
    keep_float32(model)
    model.save(tmp_path / "m.keras")
    for precision in ("float32", "mixed_bfloat16"):
        loaded = tfamp.load_model(tmp_path / "m.keras", precision=precision)
        assert precision_of(loaded) == precision
        dtype = precision.removeprefix("mixed_")
        assert loaded.layers[1](np.ones((1, 2, 3))).dtype.name == dtype
