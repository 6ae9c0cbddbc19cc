"""Numbers of the data stay float32 until a product takes them."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfamp
from tfamp.precision.keep_float32 import keep_float32

# 16 bits know every second of them, or every eighth.
YEARS = np.arange(2000, 2064, dtype="float32").reshape(16, 4)
PRECISIONS = ("mixed_float16", "mixed_bfloat16")


@keras.saving.register_keras_serializable(package="raw_data")
class Code(layers.Layer):
    """A layer of somebody else, which has no weights."""

    def __init__(self, code="first columns", **kwargs):
        super().__init__(**kwargs)
        self.code = code

    def call(self, x):
        return CODE[self.code](x)

    def get_config(self):
        return {**super().get_config(), "code": self.code}


CODE = {
    "first columns": lambda x: x[:, :2],
    "difference": lambda x: x[:, 1:] - x[:, :-1],
    "since": lambda x: (x - 2030) / 32,
    "order": lambda x: ops.one_hot(ops.argmax(x, -1), 4),
    "after": lambda x: ops.cast(x > 2033, x.dtype),
    "where": lambda x: ops.where(x < 2033, 0.0, 1.0),
    "sorted": lambda x: ops.diff(ops.sort(x, -1), axis=-1),
    "top": lambda x: ops.one_hot(ops.top_k(x, 1)[1], 4),
    "decade": lambda x: ops.floor_divide(x, 10.0) - 200,
    "leap": lambda x: ops.cast(ops.mod(x, 4) < 1, x.dtype),
    "tf": lambda x: tf.gather(tf.eye(64), tf.cast(x, "int32") - 2000),
}


@keras.saving.register_keras_serializable(package="raw_data")
class Weighted(layers.Layer):
    """It has a weight, multiplies, and does more with its inputs than that."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        return ops.matmul(x - 2030, self.kernel)


@keras.saving.register_keras_serializable(package="raw_data")
class Around(layers.Layer):
    """A layer around others, which takes their inputs first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.flat = layers.Flatten()
        self.norm = layers.BatchNormalization()
        self.dense = layers.Dense(3)

    def build(self, shape):
        self.norm.build(shape)
        self.dense.build(shape)

    def call(self, x, training=False):
        return self.dense(self.norm(self.flat(x), training=training))


@keras.saving.register_keras_serializable(package="raw_data")
class AroundOne(layers.Layer):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner
        self.dense = layers.Dense(3)

    def build(self, shape):
        if not self.inner.built:
            self.inner.build(shape)
        self.dense.build(shape)

    def call(self, x, training=False):
        return self.dense(self.inner(x, training=training))


def adapted(layer):
    layer.adapt(YEARS)
    return layer


MOVERS = {
    "Flatten": layers.Flatten,
    "Reshape": lambda: layers.Reshape((2, 2)),
    "Identity": layers.Identity,
    "Dropout": lambda: layers.Dropout(0.0),
    "Lambda": lambda: layers.Lambda(lambda x: x[:, ::-1]),
    "RepeatVector": lambda: layers.RepeatVector(2),
    "Activation": lambda: layers.Activation("relu"),
    "own": lambda: Code("first columns"),
    "two": lambda: keras.Sequential([layers.Reshape((4, 1)), layers.Flatten()]),
}
TAKERS = {
    "Normalization": lambda: adapted(layers.Normalization(axis=None)),
    "BatchNormalization": layers.BatchNormalization,
    "Rescaling": lambda: layers.Rescaling(1 / 32, -2030 / 32),
    "Embedding": lambda: layers.Embedding(2100, 3),
    "Discretization": lambda: layers.Discretization(
        bin_boundaries=[*np.arange(2000.5, 2064)], output_mode="one_hot"
    ),
    "own": lambda: Code("since"),
}
STACKS = {
    **{f"{name} alone": [make] for name, make in TAKERS.items()},
    **{
        f"{first} {second}": [MOVERS[first], TAKERS[second]]
        for first, second in itertools.product(MOVERS, TAKERS)
    },
    **{f"own {name}": [lambda name=name: Code(name)] for name in CODE},
    "of columns alone": [lambda: adapted(layers.Normalization())],
    "around one": [lambda: AroundOne(layers.BatchNormalization())],
    "of steps": [
        lambda: layers.Reshape((4, 1)),
        lambda: layers.TimeDistributed(
            adapted(layers.Normalization(axis=None))
        ),
    ],
    "of columns": [layers.Flatten, lambda: adapted(layers.Normalization())],
    "own with weights": [Weighted],
    "own with weights, moved": [layers.Flatten, Weighted],
    "own around others": [Around],
}


@keras.saving.register_keras_serializable(package="raw_data")
class Subclassed(keras.Model):
    def __init__(self, parts, **kwargs):
        super().__init__(**kwargs)
        self.parts = parts

    def call(self, x, training=False):
        for part in self.parts:
            if isinstance(part, layers.BatchNormalization | Around | AroundOne):
                x = part(x, training=training)
            else:
                x = part(x)
        return x


def built(stack, kind):
    # The same weights in each precision.
    keras.utils.set_random_seed(0)
    parts = [make() for make in STACKS[stack]]
    parts += [layers.Flatten(), layers.Dense(3)]
    inputs = keras.Input((4,))
    if kind == "subclassed":
        model = Subclassed(parts)
        model(inputs)
        return model
    outputs = inputs
    for part in parts:
        outputs = part(outputs)
    model = keras.Model(inputs, outputs)
    if kind == "nested":
        outer = keras.Input((4,))
        model = keras.Model(outer, model(outer))
    return model


def numbers(model):
    return np.asarray(ops.cast(model(YEARS, training=True), "float32"))


def test_stock_keras_rounds_them():
    keras.config.set_dtype_policy("float32")
    right = numbers(built("Flatten BatchNormalization", "functional"))
    keras.config.set_dtype_policy("mixed_bfloat16")
    stock = numbers(built("Flatten BatchNormalization", "functional"))
    assert np.linalg.norm(stock - right) > 0.1 * np.linalg.norm(right)


SOME = [
    ("Flatten Normalization", "functional", "mixed_bfloat16"),
    ("Identity BatchNormalization", "subclassed", "mixed_float16"),
    ("Reshape Embedding", "nested", "mixed_bfloat16"),
    ("Rescaling alone", "functional", "mixed_bfloat16"),
    ("own since", "functional", "mixed_float16"),
    ("own order", "subclassed", "mixed_bfloat16"),
    ("own with weights, moved", "functional", "mixed_bfloat16"),
    ("own around others", "functional", "mixed_bfloat16"),
    ("around one", "functional", "mixed_bfloat16"),
    ("of columns", "functional", "mixed_float16"),
    ("of steps", "subclassed", "mixed_bfloat16"),
]
ALL = itertools.product(
    STACKS, ("functional", "subclassed", "nested"), PRECISIONS
)


@pytest.mark.parametrize(
    ("stack", "kind", "precision"),
    [
        pytest.param(*each, marks=[] if each in SOME else [pytest.mark.long])
        for each in ALL
    ],
)
def test_they_reach_the_first_product_as_they_come(stack, kind, precision):
    keras.config.set_dtype_policy("float32")
    right = numbers(built(stack, kind))
    keras.config.set_dtype_policy(precision)
    model = built(stack, kind)
    keep_float32(model)
    rounding = 2.0**-8 if precision == "mixed_bfloat16" else 2.0**-11
    error = np.linalg.norm(numbers(model) - right)
    assert error < 2 * rounding * np.linalg.norm(right)
    assert not [each for each in keep_float32(model) if each.changed]


def test_a_file_keeps_it_and_it_is_undone(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = built("Flatten BatchNormalization", "functional")
    before = {each.name: each.compute_dtype for each in model.layers}
    keep_float32(model)
    model.save(tmp_path / "m.keras")
    loaded = tfamp.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(numbers(loaded), numbers(model))
    keep_float32(model, outputs=False, operations=False)
    after = {each.name: each.compute_dtype for each in model.layers}
    # Not the output, which is no operation.
    assert list(after.items())[:-1] == list(before.items())[:-1]


def test_what_only_multiplies_and_what_comes_later_stay_as_they_are():
    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input((4,))
    x = layers.Dense(4)(inputs)
    for each in (layers.Flatten(), layers.BatchNormalization(), Code("since")):
        x = each(x)
    # Of the data and of what is computed, by one layer.
    shared = layers.ReLU()
    x = layers.Add()([shared(x), shared(inputs)])
    model = keras.Model(inputs, layers.Dense(2)(x))
    changed = [each for each in keep_float32(model) if each.changed]
    assert [each.path for each in changed] == [model.layers[-1].name]


def test_layers_before_a_product_are_left_where_rounding_is_the_same():
    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input((4,))
    moved = layers.Reshape((2, 2), name="moved")(inputs)
    moved = layers.ReLU(name="cut")(layers.Flatten(name="flat")(moved))
    other = layers.Reshape((4, 1), name="other")(inputs)
    scaled = layers.Rescaling(0.1, name="scaled")(other)
    both = layers.Dense(3)(moved), layers.Conv1D(3, 4)(scaled)
    model = keras.Model(inputs, [layers.Dense(2)(each) for each in both])
    changed = {each.path for each in keep_float32(model) if each.changed}
    heads = {each.name for each in model.layers[-2:]}
    assert changed == {"other", "scaled", *heads}


def test_an_output_that_is_data_is_returned_as_it_came():
    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input((4,))
    flat = layers.Flatten()(inputs)
    model = keras.Model(inputs, [flat, layers.Dense(2)(flat)])
    keep_float32(model)
    np.testing.assert_array_equal(model(YEARS)[0], YEARS)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sequential_without_an_input_of_its_own(precision, tmp_path):
    keras.config.set_dtype_policy(precision)
    ids = np.array([[255, 257, 259, 2049, 2051]], "int32")
    embedding = layers.Embedding(3000, 4)
    model = keras.Sequential([embedding, layers.Flatten()])
    # Keras made an Input in the dtype of the first layer.
    assert model(ids).dtype.name in precision
    right = embedding.embeddings.numpy()[ids].reshape(1, -1)
    assert np.abs(np.asarray(ops.cast(model(ids), "float32")) - right).max() > (
        1e-3
    )
    changed = [each for each in keep_float32(model) if each.changed]
    assert changed[0].path == model.name
    model.save(tmp_path / "m.keras")
    for each in (model, tfamp.load_model(tmp_path / "m.keras")):
        np.testing.assert_allclose(each(ids), right, rtol=2.0**-8)
    nested = keras.Sequential([layers.Rescaling(1.0, -2000.0)])
    nested(YEARS)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(nested(inputs)))
    keep_float32(model)
    np.testing.assert_array_equal(nested(YEARS), YEARS - 2000)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("as_dict", [False, True])
def test_columns_are_joined_as_they_come(precision, as_dict):
    # Beyond float16's range.
    prices = YEARS * 4000 - 7_999_000
    keras.config.set_dtype_policy(precision)
    inputs = [keras.Input((2,), name=name) for name in "ab"]
    normalization = layers.Normalization()
    normalization.adapt(prices)
    joined = normalization(layers.Concatenate()(inputs))
    if as_dict:
        inputs = dict(zip("ab", inputs, strict=True))
    model = keras.Model(inputs, layers.Dense(2)(joined))
    keep_float32(model)
    parts = [prices[:, :2], prices[:, 2:]]
    columns = dict(zip("ab", parts, strict=True)) if as_dict else parts
    right = (prices - prices.mean(0)) / prices.std(0)
    right = right @ model.layers[-1].kernel.numpy()
    np.testing.assert_allclose(
        ops.cast(model(columns), "float32"), right, atol=0.01
    )


def test_training_goes_on_in_float32_of_the_data():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = built("Flatten BatchNormalization", "functional")
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensors((YEARS, YEARS[:, :3] - 2030)).repeat(2)
    tfamp.fit(model, data, verbose=0)
    moving = model.get_layer(index=2).moving_mean
    np.testing.assert_allclose(moving, YEARS.mean(0) * (1 - 0.99**2), rtol=1e-4)
