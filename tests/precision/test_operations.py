"""Sensitive operations compute in float32 inside layers of anybody."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfamp.errors import InputError
from tfamp.precision import autocast
from tfamp.precision.keep_float32 import keep_float32

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy"
    ),
    # Stock Keras, when it builds a mask of -1e9 in float16.
    pytest.mark.filterwarnings("ignore:overflow encountered in cast"),
]
SIXTEEN = ("float16", "bfloat16")
ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


@keras.saving.register_keras_serializable(package="tests")
class Code(layers.Layer):
    """A layer of somebody else: it runs an operation by name."""

    def __init__(self, name_of_code, **kwargs):
        super().__init__(**kwargs)
        self.name_of_code = name_of_code

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return CODE[self.name_of_code][0](x, self.scale)

    def get_config(self):
        return {**super().get_config(), "name_of_code": self.name_of_code}


def up(x):
    """300 and -300: their squares are beyond float16, not beyond float32."""
    return x * 300


def mean_square(x):
    return np.mean(np.square(x), -1, keepdims=True)


def norm(x):
    return np.sqrt(np.sum(np.square(x), -1, keepdims=True))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# What the layer runs, and the same in float64. x holds 1, -1, 2, ... .
CODE = {
    "rms": (
        lambda x, g: (
            up(x)
            * ops.rsqrt(ops.mean(ops.square(up(x)), -1, keepdims=True) + 1e-3)
            * g
        ),
        lambda x: up(x) / np.sqrt(mean_square(up(x)) + 1e-3),
    ),
    "x * x": (
        lambda x, g: ops.sqrt(ops.sum(up(x) * up(x), -1)),
        lambda x: norm(up(x))[..., 0],
    ),
    "same * same": (
        lambda x, g: (lambda y: ops.sqrt(ops.sum(y * y, -1)))(up(x)),
        lambda x: norm(up(x))[..., 0],
    ),
    "power": (lambda x, g: up(x) ** 2 / 1000, lambda x: up(x) ** 2 / 1000),
    "ops.power": (
        lambda x, g: ops.sqrt(ops.power(up(x), 2)) * g,
        lambda x: np.abs(up(x)),
    ),
    "tf.square": (
        lambda x, g: tf.sqrt(tf.reduce_mean(tf.square(up(x)), -1)),
        lambda x: np.sqrt(mean_square(up(x)))[..., 0],
    ),
    "norm": (
        lambda x, g: up(x) / (ops.norm(up(x), axis=-1, keepdims=True) + 1e-3),
        lambda x: up(x) / (norm(up(x)) + 1e-3),
    ),
    "normalize": (
        lambda x, g: ops.normalize(up(x), axis=-1),
        lambda x: up(x) / norm(up(x)),
    ),
    "tf.l2_normalize": (
        lambda x, g: tf.math.l2_normalize(up(x), -1),
        lambda x: up(x) / norm(up(x)),
    ),
    "var": (
        lambda x, g: ops.sqrt(ops.var(up(x), -1)),
        lambda x: np.std(up(x), -1),
    ),
    "std": (lambda x, g: ops.std(up(x), -1), lambda x: np.std(up(x), -1)),
    "exp": (
        lambda x, g: ops.log(ops.sum(ops.exp(x * 8), -1)),
        lambda x: np.log(np.sum(np.exp(x * 8), -1)),
    ),
    "tf.exp": (
        lambda x, g: tf.math.log(tf.reduce_sum(tf.exp(x * 8), -1)),
        lambda x: np.log(np.sum(np.exp(x * 8), -1)),
    ),
    "logsumexp": (
        lambda x, g: ops.logsumexp(x * 8, -1),
        lambda x: np.log(np.sum(np.exp(x * 8), -1)),
    ),
    "log of epsilon": (
        lambda x, g: ops.log(ops.maximum(ops.square(x * 0), 1e-12)),
        lambda x: np.full_like(x, np.log(1e-12)),
    ),
    "softmax": (lambda x, g: ops.softmax(x * 8), lambda x: softmax(x * 8)),
    "masked softmax": (
        lambda x, g: ops.softmax(
            x + (1 - ops.cast(x > 0, x.dtype)) * -1e9, axis=-1
        ),
        lambda x: softmax(np.where(x > 0, x, -1e9)),
    ),
    "quotient": (
        lambda x, g: ops.sum(x * x, -1) / (ops.sum(x * 0, -1) + 1e-6) * 1e-6,
        lambda x: np.sum(x * x, -1),
    ),
    "sum": (
        lambda x, g: ops.sum(ops.repeat(ops.abs(x), 4096, -1), -1) / 4096,
        lambda x: np.sum(np.abs(x), -1),
    ),
    "cumsum": (
        lambda x, g: ops.cumsum(ops.repeat(x * 0 + 1, 1000, -1), -1)[:, -1],
        lambda x: np.full(len(x), 1000.0 * x.shape[-1]),
    ),
    "segment_sum": (
        lambda x, g: ops.segment_sum(
            ops.repeat(x * 0 + 1, 1000, 0),
            ops.zeros((4000,), "int32"),
            num_segments=1,
        ),
        lambda x: np.full((1, x.shape[-1]), 4000.0),
    ),
    "positions": (
        lambda x, g: (
            ops.sin(
                ops.cast(ops.arange(2048), x.dtype)
                * ops.cast(np.array(0.37), x.dtype)
            )[:, None]
            * x[0]
        ),
        lambda x: np.sin(np.arange(2048) * 0.37)[:, None] * x[0],
    ),
    "linspace": (
        lambda x, g: ops.cos(ops.linspace(2047, 2050, 4, dtype=g.dtype) * x),
        lambda x: np.cos(np.arange(2047, 2051) * x),
    ),
    "while_loop": (
        lambda x, g: ops.while_loop(
            lambda i, y: i < 3,
            lambda i, y: (i + 1, y * ops.rsqrt(ops.mean(ops.square(up(y))))),
            (0, x),
        )[1],
        # From the second round on it divides by what the first one made.
        lambda x: x / np.sqrt(np.mean(np.square(x))) / 300,
    ),
    "squareplus": (
        lambda x, g: keras.activations.squareplus(up(x)),
        lambda x: (up(x) + np.sqrt(np.square(up(x)) + 4)) / 2,
    ),
    # Its state begins as an element.
    "foldl": (
        lambda x, g: tf.foldl(
            lambda a, b: a + b, ops.repeat(x[:1] * 0 + 1, 600, 0)
        ),
        lambda x: np.full(x.shape[-1], 600.0),
    ),
    "scan": (
        lambda x, g: ops.scan(
            lambda a, b: (a + b, b), x[0] * 0, ops.repeat(x[:1] * 0 + 1, 600, 0)
        )[0],
        lambda x: np.full(x.shape[-1], 600.0),
    ),
    # A layer that is another one in each call.
    "layer in a call": (
        lambda x, g: layers.UnitNormalization()(up(x)),
        lambda x: up(x) / norm(up(x)),
    ),
    "cond": (
        lambda x, g: ops.cond(
            ops.sum(x) > -1e9,
            lambda: ops.sqrt(ops.square(up(x))),
            lambda: x,
        ),
        lambda x: np.abs(up(x)),
    ),
}
X = np.array(
    [[1, -1, 2, 1], [2, 1, -2, 1], [1, 1, 1, 1], [-1, 2, 1, 2]], "float32"
)


def kept_code(name, dtype="float16"):
    """A model of one such layer, after keep_float32; and that layer."""
    keras.config.set_dtype_policy(f"mixed_{dtype}")
    inputs = keras.Input((4,), batch_size=4)
    layer = Code(name, name="code")
    model = keras.Model(inputs, layer(inputs))
    kept = keep_float32(model, outputs=False)
    assert [each.path for each in kept if each.changed] == ["code"]
    return model, layer


def compiled(layer):
    return tf.function(layer, jit_compile=True)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", CODE)
def test_an_operation_agrees_with_float64(name, dtype):
    _, layer = kept_code(name, dtype)
    expected = CODE[name][1](X.astype("float64"))
    runs = [layer, tf.function(layer)]
    if name in ("rms", "masked softmax", "cumsum"):
        runs.append(compiled(layer))
    for run in runs:
        result = run(tf.constant(X))
        assert result.dtype.name == dtype
        np.testing.assert_allclose(
            tf.cast(result, tf.float32).numpy(),
            expected,
            rtol=2 * ROUNDING[dtype],
            atol=2 * ROUNDING[dtype],
        )


@keras.saving.register_keras_serializable(package="tests")
class OwnAttention(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]))
        self.drop = layers.Dropout(0.1, seed=1)

    def call(self, x):
        q = ops.matmul(x, self.kernel)
        scores = ops.softmax(ops.matmul(q, ops.transpose(x, (0, 2, 1))))
        scores = self.drop(scores) * ops.cast(scores > 0, scores.dtype)
        return ops.einsum("bij,bjk->bik", scores, x)


def dtypes_of(function, *args, names):
    graph = tf.function(function).get_concrete_function(*args).graph
    found = {
        tf.as_dtype(node.attr["T"].type).name
        for node in graph.as_graph_def().node
        if node.op in names
    }
    assert found
    return found


@pytest.mark.parametrize("training", [False, True])
def test_products_stay_in_16_bits_between_float32_operations(training):
    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input((3, 4))
    outputs = layers.Dense(2, "softmax")(OwnAttention()(inputs))
    model = keras.Model(inputs, outputs)
    keep_float32(model)
    x = tf.ones((2, 3, 4))

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(model(x, training=training), x.dtype))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    products = ("MatMul", "BatchMatMulV2", "Einsum")
    assert dtypes_of(step, x, names=products) == {"bfloat16"}
    assert dtypes_of(step, x, names=("Softmax",)) == {"float32"}
    assert {g.dtype for g in step(x)} == {tf.float32}


def test_a_file_keeps_it_and_keep_float32_undoes_it(tmp_path):
    model, layer = kept_code("rms")
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    expected = CODE["rms"][1](X.astype("float64"))
    np.testing.assert_allclose(loaded(X), expected, rtol=2e-3)
    assert not [
        each for each in keep_float32(loaded, outputs=False) if each.changed
    ]
    checkpoint = tf.train.Checkpoint(model=model)
    layer.scale.assign([2.0] * 4)
    tf.train.Checkpoint(model=loaded).restore(
        checkpoint.save(tmp_path / "checkpoint")
    ).assert_consumed()
    np.testing.assert_allclose(loaded(X), 2 * expected, rtol=2e-3)
    for each in (model, loaded):
        keep_float32(each, outputs=False, operations=False)
        assert type(each.get_layer("code")) is Code
        np.testing.assert_array_equal(each(X), np.zeros((4, 4)))


def replaced():
    return {
        (id(owner), name): vars(owner)[name] is original
        for owner, name, original, _ in autocast._replacements()
    }


def test_nothing_stays_replaced_and_other_threads_see_nothing():
    kept, _ = kept_code("rms")
    keras.config.set_dtype_policy("mixed_float16")
    stock = Code("rms")
    stock(X)
    assert all(replaced().values())
    results, errors = {}, []

    def many(name, layer):
        try:
            results[name] = [np.asarray(layer(X)) for _ in range(20)]
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=many, args=args)
        for args in (("kept", kept), ("stock", stock), ("kept too", kept))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    right = CODE["rms"][1](X.astype("float64"))
    for result in results["kept"] + results["kept too"]:
        np.testing.assert_allclose(result, right, rtol=2e-3)
    for result in results["stock"]:
        np.testing.assert_array_equal(result, np.zeros((4, 4)))
    assert all(replaced().values())


def test_an_error_inside_leaves_nothing_replaced():
    _, layer = kept_code("rms")
    with pytest.raises(Exception, match=r"text|string"):
        layer(tf.constant([["text"]]))
    assert all(replaced().values())


def test_replicas_compute_it_each(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        model, _ = kept_code("rms")

    @tf.function
    def run(x):
        return strategy.run(model, args=(x,))

    for result in strategy.experimental_local_results(run(tf.constant(X))):
        np.testing.assert_allclose(
            result, CODE["rms"][1](X.astype("float64")), rtol=2e-3
        )


def test_fit_of_keras_and_ours_train_with_it():
    import tfamp

    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(1)(Code("rms")(inputs)))
    keep_float32(model)
    model.compile(
        tfamp.wrap_optimizer("sgd"), loss="mse", auto_scale_loss=False
    )
    y = np.ones((4, 1), "float32")
    batches = tf.data.Dataset.from_tensors((X, y))
    history = model.fit(batches, epochs=8, shuffle=False, verbose=0).history[
        "loss"
    ]
    history += tfamp.fit(model, batches, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    # The first steps may be skipped while the scale is being found, and count
    # as none in what Keras's fit reports.
    assert history[-1] < next(loss for loss in history if loss)


def test_operations_are_added_and_removed():
    keras.config.set_dtype_policy("mixed_float16")
    # Data in float32 would stay so until a product.
    inputs = keras.Input((4,), batch_size=4, dtype="float16")
    model = keras.Model(inputs, Code("power", name="code")(inputs))
    kept = keep_float32(
        model, outputs=False, operations={"remove": ["power", "divide"]}
    )
    assert not kept
    assert np.isinf(model(X)).all()
    kept = keep_float32(
        model,
        outputs=False,
        operations={"remove": ["divide"], "add": ["multiply"]},
    )
    assert "multiply, power" in kept[0].reason
    with pytest.raises(InputError, match=r"'softmaks'.*softmax"):
        keep_float32(model, operations={"add": ["softmaks"]})
    with pytest.raises(InputError, match="'add' and 'remove'"):
        keep_float32(model, operations={"drop": []})


class Recommender(keras.Model):
    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(
            6000,
            1,
            embeddings_initializer=lambda shape, dtype: ops.reshape(
                ops.arange(6000, dtype="float32"), shape
            ),
        )

    def call(self, x):
        return self.table(x)


def test_ids_that_come_as_floats_reach_the_embedding_unrounded():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = Recommender()
    ids = np.array([[257.0, 2049.0, 5001.0]], "float32")
    assert not np.array_equal(np.asarray(model(ids), "float32")[..., 0], ids)
    assert keep_float32(model)[0].path == model.name
    np.testing.assert_array_equal(model(ids)[..., 0], ids)
    keep_float32(model, operations=False)
    assert model.autocast
    assert type(model) is Recommender


class Block(layers.Layer):
    """A norm of its own, and a shortcut around a layer."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(4)

    def call(self, x):
        size = ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True))
        return x + self.inner(x * size)


def test_a_kept_layer_put_to_float32_later_takes_what_others_round():
    keras.config.set_dtype_policy("mixed_float16")
    block = Block()
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), block])
    (kept,) = keep_float32(model, outputs=False)
    assert "float inputs reach it as they come" in str(kept)
    for layer in (block, block.inner):
        layer.dtype_policy = "float32"
    outputs = model(np.ones((2, 4)))
    assert outputs.dtype == tf.float32
    # Its numbers, too: those that came, and no float16 within.
    x = model.layers[0](np.ones((2, 4)))
    assert x.dtype == tf.float16
    np.testing.assert_array_equal(outputs, block(ops.cast(x, "float32")))


class TokensAndPositions(layers.Layer):
    def __init__(self):
        super().__init__()
        self.token = layers.ReversibleEmbedding(20, 8)
        self.position = layers.Embedding(6, 8)

    def call(self, x):
        return self.token(x) + self.position(ops.arange(6))


def tied():
    inputs = keras.Input((6,), dtype="int32")
    embed = TokensAndPositions()
    x = layers.Dense(8)(embed(inputs))
    return keras.Model(inputs, embed.token(x, reverse=True)), embed


def test_a_tied_embedding_inside_a_layer_can_still_be_called():
    keras.config.set_dtype_policy("mixed_float16")
    model, _ = tied()
    keep_float32(model)
    assert model(np.zeros((2, 6), "int32")).dtype == tf.float32


def test_what_cannot_be_called_afterwards_is_put_back():
    keras.config.set_dtype_policy("mixed_float16")
    model, embed = tied()
    before = model(np.zeros((2, 6), "int32"))
    with pytest.raises(InputError, match=r"'tokens_and_positions.*as it was"):
        keep_float32(model, operations=False)
    assert embed.token.compute_dtype == "float16"
    after = model(np.zeros((2, 6), "int32"))
    assert after.dtype == before.dtype
    np.testing.assert_array_equal(after, before)
