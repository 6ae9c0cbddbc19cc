import itertools
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from packaging.version import Version

from tests import matmul_dtypes
from tests.conftest import first_always, mostly_long
from tfamp import keras_internals
from tfamp.errors import InputError
from tfamp.precision.keep_float32 import keep_float32

BATCH = np.zeros((2, 4), "float32")

# Keras 3.15 copies its variables with np.array, of which NumPy 2 warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)


@pytest.fixture(params=first_always(["mixed_float16", "mixed_bfloat16"], 1))
def precision(request):
    keras.config.set_dtype_policy(request.param)
    return request.param


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")


def functional(*stack, shape=(4,)):
    inputs = keras.Input(shape)
    x = inputs
    for layer in stack:
        x = layer(x)
    return keras.Model(inputs, x)


def saved_and_loaded(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras")


def changed_paths(kept):
    return [each.path for each in kept if each.changed]


def reasons(kept):
    return {each.path: each.reason for each in kept}


def product_dtypes(function, *args):
    traced = tf.function(function).get_concrete_function(*args)
    return {
        node.attr["T"].type
        for node in traced.graph.as_graph_def().node
        if node.op in matmul_dtypes.PRODUCTS
    }


@pytest.mark.parametrize(
    ("build", "reloaded"),
    mostly_long(
        itertools.product(
            (matmul_dtypes.small_resnet, matmul_dtypes.small_transformer),
            (False, True),
        ),
        always=[
            (matmul_dtypes.small_resnet, True),
            (matmul_dtypes.small_transformer, False),
        ],
    ),
)
def test_products_run_in_16_bits_and_softmax_norms_and_loss_in_float32(
    build, precision, reloaded, tmp_path
):
    model, loss, x, y = build()
    keep_float32(model)
    if reloaded:
        model = saved_and_loaded(model, tmp_path)
    steps = matmul_dtypes.training_steps(model, loss, x, y)
    dtypes = {kind: set() for kind in ("product", "softmax or loss")}
    for step in steps:
        # The head's product is float32, as all of the head.
        if not (step.kind == "product" and "vocabulary" in step.name):
            dtypes.setdefault(step.kind, set()).add(step.dtype)
    assert dtypes == {
        "product": {precision.removeprefix("mixed_")},
        "softmax or loss": {"float32"},
        "normalization": {"float32"},
    }, matmul_dtypes.as_table(steps)


@pytest.mark.parametrize(
    "build",
    first_always(
        [matmul_dtypes.small_resnet, matmul_dtypes.small_transformer], 1
    ),
)
def test_the_trace_sees_the_16_bit_softmax_of_a_model_left_alone(
    build, precision
):
    model, loss, x, y = build()
    steps = matmul_dtypes.training_steps(model, loss, x, y)
    softmax_dtypes = {step.dtype for step in steps if step.op == "Softmax"}
    assert precision.removeprefix("mixed_") in softmax_dtypes


def kernel_gradient_of_saturated_softmax(keep):
    head = layers.Dense(2, activation="softmax", use_bias=False)
    model = functional(head, shape=(1,))
    # Logits 0 and 32: in float16 the probabilities are exactly 0 and 1.
    head.set_weights([np.array([[0.0, 32.0]])])
    if keep:
        keep_float32(model)
    with tf.GradientTape() as tape:
        probabilities = model(np.ones((1, 1)), training=True)
        loss_fn = keras.losses.SparseCategoricalCrossentropy()
        loss = loss_fn(np.zeros((1,)), probabilities)
    return tape.gradient(loss, head.kernel.value).numpy()


def test_a_saturated_softmax_head_has_the_gradient_of_float32(precision):
    stock = kernel_gradient_of_saturated_softmax(keep=False)
    kept = kernel_gradient_of_saturated_softmax(keep=True)
    keras.config.set_dtype_policy("float32")
    float32 = kernel_gradient_of_saturated_softmax(keep=False)
    np.testing.assert_array_equal(float32, [[-1.0, 1.0]])
    np.testing.assert_array_equal(kept, float32)
    if precision == "mixed_float16":
        np.testing.assert_array_equal(stock, [[0.0, 0.0]])


HEADS = {
    "linear": lambda: [layers.Dense(3)],
    "sigmoid": lambda: [layers.Dense(3, activation="sigmoid")],
    "log_softmax": lambda: [layers.Dense(3, activation="log_softmax")],
    "softmax layer as activation": lambda: [
        layers.Dense(3, activation=layers.Softmax())
    ],
    "softmax layer": lambda: [layers.Dense(3), layers.Softmax()],
    "activation layer": lambda: [layers.Dense(3), layers.Activation("softmax")],
    "handed through": lambda: [layers.Dense(3), layers.Activation("linear")],
    "reshaped": lambda: [
        layers.Dense(4, activation="softmax"),
        layers.Reshape((2, 2)),
    ],
    "dropped out": lambda: [
        layers.Dense(3, activation="softmax"),
        layers.Dropout(0.5),
    ],
    "normalized": lambda: [layers.Dense(3), layers.LayerNormalization()],
    "unit normalized": lambda: [layers.Dense(3), layers.UnitNormalization()],
    "spectrally normalized": lambda: [
        layers.SpectralNormalization(layers.Dense(3))
    ],
    "rescaled": lambda: [layers.Dense(3), layers.Rescaling(0.5)],
    "keras.ops": lambda: [
        layers.Dense(3, activation="softmax"),
        keras.ops.square,
    ],
    "per time step": lambda: [
        layers.Reshape((4, 1)),
        layers.TimeDistributed(layers.Dense(3, activation="softmax")),
    ],
    "einsum": lambda: [
        layers.EinsumDense("ab,bc->ac", output_shape=3, activation="softmax")
    ],
    "convolution": lambda: [
        layers.Reshape((4, 1)),
        layers.Conv1D(2, 1, activation="sigmoid"),
    ],
    "separable convolution": lambda: [
        layers.Reshape((4, 1)),
        layers.SeparableConv1D(2, 1),
    ],
}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("name", HEADS)
def test_outputs_are_float32_and_products_of_bounded_ones_16_bits(
    name, precision, tmp_path
):
    model = functional(*HEADS[name]())
    assert model(BATCH).dtype.name == precision.removeprefix("mixed_")
    keep_float32(model)
    loaded = saved_and_loaded(model, tmp_path)
    expected = {tf.dtypes.as_dtype(precision.removeprefix("mixed_"))}
    if name in ("linear", "handed through", "separable convolution"):
        expected = {tf.float32}
    for each in (model, loaded):
        for training in (False, True):

            def run(x, each=each, training=training):
                return each(x, training=training)

            assert run(BATCH).dtype == tf.float32
            if name == "spectrally normalized":
                # Normalizing a kernel is two matrix products, in float32.
                continue
            dtypes = product_dtypes(run, BATCH)
            assert {tf.dtypes.as_dtype(d) for d in dtypes} == expected
    np.testing.assert_array_equal(loaded(BATCH), model(BATCH))


def test_a_softmax_behind_a_reshape_is_not_rounded_to_16_bits(mixed_float16):
    head = layers.Dense(2, activation="softmax", use_bias=False)
    model = functional(head, layers.Reshape((2, 1)), shape=(1,))
    head.set_weights([np.array([[0.0, 16.0]])])
    keep_float32(model)
    probability = model(np.ones((1, 1)))[0, 0, 0]
    # float16 has a spacing of 6e-8 there.
    np.testing.assert_allclose(probability, np.exp(-16.0), rtol=1e-5)


def test_each_output_of_a_model_is_float32(precision):
    inputs = keras.Input((4,))
    x = layers.Dense(4, activation="relu")(inputs)
    shared = layers.Dense(4, name="shared")
    model = keras.Model(
        inputs,
        {
            "probabilities": layers.Dense(2, activation="softmax")(x),
            "shared": shared(shared(x)),
            "sum": layers.Add()([x, inputs]),
        },
    )
    keep_float32(model)
    assert {y.dtype for y in model(BATCH).values()} == {tf.float32}


def test_a_layer_that_cannot_be_split_is_float32_as_a_whole(precision):
    model = functional(layers.PReLU(name="own"))
    kept = keep_float32(model)
    assert reasons(kept) == {
        "own": "output in float32, and with it the whole layer"
    }
    assert model(BATCH).dtype == tf.float32


def test_attention_as_the_output_is_float32_also_when_loaded(
    precision, tmp_path
):
    tokens = keras.Input((3, 4))
    attention = layers.MultiHeadAttention(1, 2, name="a")
    model = keras.Model(tokens, attention(tokens, tokens))
    assert changed_paths(keep_float32(model)) == ["a"]
    batch = np.zeros((1, 3, 4), "float32")
    assert model(batch).dtype == tf.float32
    assert saved_and_loaded(model, tmp_path)(batch).dtype == tf.float32


def test_outputs_stay_16_bits_when_asked_to(precision):
    model = functional(layers.Dense(4, activation="softmax"), layers.Dense(3))
    kept = keep_float32(model, outputs=False)
    assert changed_paths(kept) == [model.layers[1].name]
    assert model(BATCH).dtype.name == precision.removeprefix("mixed_")


INSIDE = {
    "dense softmax": lambda: layers.Dense(4, activation="softmax"),
    "dense log_softmax": lambda: layers.Dense(4, activation="log_softmax"),
    "dense sparsemax": lambda: layers.Dense(4, activation="sparsemax"),
    "dense softmax layer": lambda: layers.Dense(
        4, activation=layers.Softmax(name="inner")
    ),
    "softmax": lambda: layers.Softmax(),
    "activation": lambda: layers.Activation("softmax"),
    "time distributed": lambda: layers.TimeDistributed(layers.Softmax()),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_softmax_inside_the_model_returns_16_bits_from_float32(
    name, precision, tmp_path
):
    shape = (4, 4) if name == "time distributed" else (4,)
    model = functional(INSIDE[name](), layers.Dense(2), shape=shape)
    assert len(changed_paths(keep_float32(model))) == 2
    batch = np.zeros((2, *shape), "float32")
    for each in (model, saved_and_loaded(model, tmp_path)):
        layer = each.layers[1]
        assert layer(batch).dtype.name == precision.removeprefix("mixed_")
        traced = tf.function(layer).get_concrete_function(batch)
        dtypes = {
            tf.dtypes.as_dtype(node.attr["T"].type)
            for node in traced.graph.as_graph_def().node
            if node.op in ("Softmax", "LogSoftmax", "Cumsum")
        }
        assert dtypes == {tf.float32}


@pytest.mark.parametrize("cls", [layers.Attention, layers.AdditiveAttention])
def test_attention_without_heads_agrees_with_float32(cls, precision, tmp_path):
    query = keras.Input((3, 4))
    value = keras.Input((3, 4))
    outputs = layers.Dense(2, "softmax")(cls(name="a")([query, value]))
    model = keras.Model([query, value], outputs)
    keep_float32(model)
    random = np.random.default_rng(0)
    q, v = random.normal(size=(2, 2, 3, 4)).astype("float32")
    mask = [None, np.array([[True, True, False]] * 2)]
    loaded = saved_and_loaded(model, tmp_path)
    result, weights = loaded.get_layer("a")(
        [q, v], mask=mask, return_attention_scores=True, use_causal_mask=True
    )
    float32 = cls(dtype="float32")
    float32.build([q.shape, v.shape])
    float32.set_weights(loaded.get_layer("a").get_weights())
    expected, _ = float32(
        [q, v], mask=mask, return_attention_scores=True, use_causal_mask=True
    )
    assert result.dtype.name == precision.removeprefix("mixed_")
    np.testing.assert_allclose(
        tf.cast(result, tf.float32), expected, atol=0.03, rtol=0.03
    )
    # Masked by the causal mask, and by the mask of the value.
    weights = tf.cast(weights, tf.float32).numpy()
    assert weights[0, 0, 1] == weights[0, 2, 2] == 0.0
    traced = tf.function(loaded).get_concrete_function([q, v])
    assert {
        tf.dtypes.as_dtype(node.attr["T"].type)
        for node in traced.graph.as_graph_def().node
        if node.op == "Softmax"
    } == {tf.float32}
    assert product_dtypes(loaded, [q, v]) == {
        tf.as_dtype(precision.removeprefix("mixed_")).as_datatype_enum
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_returned_attention_scores_leave_the_value_product_in_16_bits(
    dropout, precision
):
    tokens = keras.Input((3, 4))
    attention = layers.MultiHeadAttention(2, 2, dropout=dropout)
    outputs, _ = attention(tokens, tokens, return_attention_scores=True)
    model = keras.Model(tokens, layers.Dense(2, "softmax")(outputs))
    keep_float32(model)
    assert product_dtypes(model, np.zeros((1, 3, 4), "float32")) == {
        tf.as_dtype(precision.removeprefix("mixed_")).as_datatype_enum
    }


@keras.saving.register_keras_serializable(package="tests")
class NamedAttention(layers.MultiHeadAttention):
    """As a user's subclass may be: nothing but another name."""


def test_a_subclass_of_attention_is_kept_and_says_it_is_not_saved(precision):
    tokens = keras.Input((3, 4))
    x = NamedAttention(2, 2, dropout=0.1, name="a")(tokens, tokens)
    model = keras.Model(tokens, layers.Dense(2)(x))
    kept = keep_float32(model)
    path, *_ = changed_paths(kept)
    assert path.startswith("a/softmax")
    assert reasons(kept)[path].endswith(
        "not saved, repeat keep_float32 after loading"
    )
    steps = matmul_dtypes.training_steps(
        model,
        keras.losses.MeanSquaredError(),
        tf.zeros((1, 3, 4)),
        tf.zeros((1, 3, 2)),
    )
    dtypes = {(s.op, s.dtype) for s in steps if s.op == "Softmax"}
    assert dtypes == {("Softmax", "float32")}


@pytest.mark.parametrize(
    "norm",
    [
        layers.BatchNormalization,
        layers.LayerNormalization,
        layers.RMSNormalization,
        lambda name: layers.GroupNormalization(groups=2, name=name),
    ],
)
def test_normalizations_that_are_float32_inside_keep_their_16_bit_result(
    norm, precision
):
    model = functional(layers.Dense(4), norm(name="norm"), layers.Dense(1))
    kept = keep_float32(model)
    is_inside = (
        norm is not layers.RMSNormalization
        or keras_internals.RMS_NORMALIZATION_IS_FLOAT32
    )
    assert ("norm" in changed_paths(kept)) != is_inside
    assert ("Keras" in reasons(kept)["norm"]) == is_inside
    norm = model.get_layer("norm")
    assert norm(BATCH).dtype.name == precision.removeprefix("mixed_")
    # 300 squared overflows float16; the spread around it is 1, 1, -1, -1.
    x = np.array([[301.0, 301.0, 299.0, 299.0]] * 2)
    if precision == "mixed_float16":
        assert np.isfinite(norm(x, training=True)).all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_unit_normalization_does_not_overflow(mixed_float16, tmp_path):
    model = functional(layers.UnitNormalization(), layers.Dense(1), shape=(2,))
    x = np.array([[300.0, 400.0]])
    np.testing.assert_array_equal(model.layers[1](x), [[0.0, 0.0]])
    keep_float32(model)
    for each in (model, saved_and_loaded(model, tmp_path)):
        result = each.layers[1](x)
        assert result.dtype == tf.float16
        np.testing.assert_allclose(result, [[0.6, 0.8]], rtol=1e-3)


def spectrally_normalized_kernel(keep):
    keras.utils.set_random_seed(1)
    inner = layers.Dense(3)
    model = functional(layers.SpectralNormalization(inner), layers.Dense(1))
    if keep:
        keep_float32(model)
    model(BATCH + 1, training=True)
    return inner.kernel.numpy()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_spectral_normalization_writes_float32_weights(mixed_float16):
    stock = spectrally_normalized_kernel(keep=False)
    kept = spectrally_normalized_kernel(keep=True)
    keras.config.set_dtype_policy("float32")
    float32 = spectrally_normalized_kernel(keep=False)
    np.testing.assert_array_equal(stock, stock.astype("float16"))
    np.testing.assert_allclose(kept, float32, rtol=1e-6)


@pytest.mark.parametrize("adapted", [False, True])
def test_input_normalization_takes_statistics_beyond_float16(
    adapted, mixed_float16, tmp_path
):
    if adapted:
        norm = layers.Normalization()
        norm.adapt(np.array([[99_000.0], [101_000.0]], "float32"))
    else:
        norm = layers.Normalization(mean=100_000.0, variance=1e6)
    model = functional(norm, layers.Dense(1), shape=(1,))
    keep_float32(model)
    for each in (model, saved_and_loaded(model, tmp_path)):
        result = each.layers[1](np.array([[102_000.0]]))
        np.testing.assert_allclose(result, [[2.0]], rtol=1e-5)


class Classifier(keras.Model):
    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(1, 2, dropout=0.1)
        self.head = layers.Dense(2, activation="softmax", name="head")

    def call(self, x, training=None):
        x = self.attention(x, x, training=training)
        return self.head(x)


def test_a_subclassed_model_is_kept_and_says_what_a_file_lacks(precision):
    model = Classifier()
    model(np.zeros((1, 3, 4), "float32"))
    kept = keep_float32(model)
    assert changed_paths(kept) == [model.attention.name, "head"]
    assert all("not saved" in each.reason for each in kept)
    assert model(np.zeros((1, 3, 4), "float32")).dtype == tf.float32


class TokenClassifier(keras.Model):
    def __init__(self):
        super().__init__()
        self.table = self.add_weight(shape=(5, 4))
        self.head = layers.Dense(2)

    def call(self, inputs):
        token_ids, mask = inputs["token_ids"], inputs["mask"]
        # Shifting a float is an error.
        x = keras.ops.take(self.table, keras.ops.right_shift(token_ids, 1), 0)
        return self.head(x * keras.ops.cast(mask, x.dtype)[..., None])


class Head(keras.Model):
    def __init__(self, cast):
        super().__init__()
        self.cast = cast
        self.head = layers.Dense(2, name="head")

    def call(self, x):
        x = self.head(x) * 2.0
        return keras.ops.cast(x, "float32") if self.cast else x


def test_a_model_with_integer_inputs_is_traced_too(precision):
    model = TokenClassifier()
    ids = np.zeros((1, 3), "int32")
    model({"token_ids": ids, "mask": ids})
    keep_float32(model)
    assert model({"token_ids": ids, "mask": ids}).dtype == tf.float32


def test_an_output_made_by_no_layer_is_an_error_that_names_the_cast(precision):
    model = Head(cast=False)
    model(BATCH)
    with pytest.raises(InputError, match=r"keras.ops.cast\(x, 'float32'\)"):
        keep_float32(model)
    assert keep_float32(model, outputs=False) == []
    model = Head(cast=True)
    model(BATCH)
    assert keep_float32(model) == []


def test_a_matrix_product_made_by_no_layer_is_an_error(precision):
    inputs = keras.Input((4,))
    x = layers.Dense(4)(inputs)
    model = keras.Model(inputs, keras.ops.matmul(x, keras.ops.transpose(x)))
    with pytest.raises(InputError, match="matrix product"):
        keep_float32(model)


def test_nested_sequential_and_shared_layers_are_each_kept_once(
    precision, tmp_path
):
    encoder = keras.Sequential(
        [
            layers.Dense(4, activation="softmax", name="gate"),
            layers.LayerNormalization(name="norm"),
        ],
        name="encoder",
    )
    head = keras.Sequential([layers.Dense(2, name="gate")], name="head")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, head(encoder(encoder(inputs))))
    kept = keep_float32(model)
    assert [each.path for each in kept] == [
        "encoder/gate",
        "encoder/norm",
        "head/gate",
    ]
    loaded = saved_and_loaded(model, tmp_path)
    assert changed_paths(keep_float32(loaded)) == []
    np.testing.assert_array_equal(loaded(BATCH), model(BATCH))


@pytest.mark.slow
def test_calling_it_twice_changes_nothing(precision):
    model, *_ = matmul_dtypes.small_transformer()
    first = keep_float32(model)
    second = keep_float32(model)
    assert changed_paths(second) == []
    assert reasons(second) == reasons(first)
    assert changed_paths(first)


def test_a_float32_model_has_nothing_to_keep():
    assert keep_float32(functional(layers.Dense(2, activation="softmax"))) == []


def test_a_policy_map_is_respected(tmp_path):
    keras.config.set_dtype_policy(
        keras.dtype_policies.DTypePolicyMap(
            keras.DTypePolicy("mixed_bfloat16"),
            {"first": keras.DTypePolicy("float32")},
        )
    )
    model = functional(
        layers.Dense(4, activation="softmax", name="first"),
        layers.Dense(4, name="second"),
        layers.BatchNormalization(name="last"),
    )
    kept = keep_float32(model)
    assert changed_paths(kept) == ["last"]
    assert reasons(kept)["first"] == "float32 by its own dtype policy"
    loaded = saved_and_loaded(model, tmp_path)
    dtypes = [each.compute_dtype for each in loaded.layers[1:]]
    assert dtypes == ["float32", "bfloat16", "float32"]


def test_a_policy_map_does_not_reach_layers_without_a_path():
    keras.config.set_dtype_policy(
        keras.dtype_policies.DTypePolicyMap(
            keras.DTypePolicy("mixed_bfloat16"),
            {"first": keras.DTypePolicy("float32")},
        )
    )
    model = functional(
        layers.Dense(4, name="first"),
        layers.ReLU(),
        layers.Softmax(name="softmax"),
    )
    assert model.get_layer("softmax").path is None
    assert changed_paths(keep_float32(model)) == ["softmax"]


def test_a_compiled_model_that_has_trained_is_traced_anew(mixed_float16):
    model = functional(layers.Dense(2, activation="softmax"))
    model.compile("sgd", "sparse_categorical_crossentropy")
    y = np.zeros((2,), "int32")
    model.fit(BATCH, y, verbose=0)
    assert model.predict(BATCH, verbose=0).dtype == "float16"
    keep_float32(model)
    assert model.predict(BATCH, verbose=0).dtype == "float32"
    model.fit(BATCH, y, verbose=0)


def test_it_works_in_the_scope_of_a_strategy(mixed_float16, mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        model, *_ = matmul_dtypes.small_resnet()
        keep_float32(model)

    @tf.function
    def run(x):
        return strategy.run(model, args=(x,), kwargs={"training": True})

    outputs = strategy.experimental_local_results(run(tf.zeros((2, 8, 8, 3))))
    assert len(outputs) == 2
    assert {y.dtype for y in outputs} == {tf.float32}


def test_finding_the_outputs_leaves_variables_and_layers_as_they_were(
    mixed_float16,
):
    model, *_ = matmul_dtypes.small_resnet()
    before = [w.numpy() for w in model.weights]
    attributes = {name: set(vars(layer)) for name, layer in by_name(model)}
    keep_float32(model)
    for weight, former in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), former)
    assert {n: set(vars(each)) for n, each in by_name(model)} == attributes


def by_name(model):
    return [(layer.name, layer) for layer in model.layers]


@pytest.mark.parametrize(
    "wanted",
    [
        ["block/a", "block/b"],
        ["a", "b"],
        "block/*",
        "block",
        lambda model: model.get_layer("block"),
        lambda model: model.get_layer("block").layers,
    ],
)
def test_chosen_layers_compute_in_float32_as_a_whole(
    wanted, precision, tmp_path
):
    block = keras.Sequential(
        [layers.Dense(4, name="a"), layers.Dense(4, name="b")], name="block"
    )
    model = functional(block, layers.Dense(4, name="c"))
    kept = keep_float32(
        model, wanted(model) if callable(wanted) else wanted, outputs=False
    )
    assert reasons(kept) == {
        # It has no Input of its own, and Keras's rounds what it takes.
        "block": "inputs as they come, ids among them",
        "block/a": "chosen by the caller",
        "block/b": "chosen by the caller",
    }
    for each in (model, saved_and_loaded(model, tmp_path)):
        inner = each.get_layer("block").layers
        assert [i.compute_dtype for i in inner] == ["float32", "float32"]
        assert each.get_layer("c").compute_dtype == precision[6:]


def test_chosen_attention_stays_whole_through_a_file(precision, tmp_path):
    tokens = keras.Input((3, 4))
    x = layers.MultiHeadAttention(1, 2, dropout=0.1, name="a")(tokens, tokens)
    model = keras.Model(tokens, layers.Dense(2)(x))
    assert keep_float32(model, "a")[0].path == "a"
    batch = np.zeros((1, 3, 4), "float32")
    for each in (model, saved_and_loaded(model, tmp_path)):
        attention = each.get_layer("a")
        assert product_dtypes(lambda x, a=attention: a(x, x), batch) == {
            tf.float32.as_datatype_enum
        }


def test_an_unknown_layer_is_an_error_with_the_nearest_paths(mixed_float16):
    model = functional(layers.Dense(4, name="encoder"), layers.Dense(2))
    with pytest.raises(InputError, match=r"'encodr'.* encoder"):
        keep_float32(model, ["encodr"])
    with pytest.raises(InputError, match="'stranger'"):
        keep_float32(model, [layers.Dense(1, name="stranger")])
    assert keep_float32(model)[-1].changed


def test_an_unbuilt_model_is_an_error_that_says_how_to_build(mixed_float16):
    with pytest.raises(InputError, match="not built; call it once"):
        keep_float32(keras.Sequential([layers.Dense(2)]))


def test_something_else_than_a_model_is_an_error():
    with pytest.raises(InputError, match="got Dense"):
        keep_float32(layers.Dense(2))


@pytest.mark.skipif(
    Version(keras.__version__) < Version("3.13"),
    reason="quantize takes no filters",
)
def test_a_quantized_layer_cannot_become_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = functional(layers.Dense(16, name="q"), layers.Dense(2), shape=(16,))
    model.quantize("float8", filters="q")
    with pytest.raises(InputError, match="'q' is quantized"):
        keep_float32(model, "q")
    assert model.get_layer("q").compute_dtype == "bfloat16"
    keep_float32(model)
    assert model(np.zeros((1, 16), "float32")).dtype == tf.float32


@pytest.mark.slow
def test_a_new_process_loads_the_model_after_one_import(
    mixed_float16, tmp_path
):
    model, _, x, _ = matmul_dtypes.small_transformer()
    keep_float32(model)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "expected.npy", model(x))
    program = (
        "import keras, numpy as np, tfamp.precision.keep_float32\n"
        f"model = keras.models.load_model({str(tmp_path / 'model.keras')!r})\n"
        f"expected = np.load({str(tmp_path / 'expected.npy')!r})\n"
        "y = np.asarray(model(np.zeros((2, 6), 'int32')))\n"
        "assert y.dtype == 'float32'\n"
        "assert np.array_equal(y, expected), (y, expected)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
