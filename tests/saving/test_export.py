"""What is exported was run, and is what the model computes in float32."""

import importlib.util
import math
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from packaging.version import Version

import tfamp
from tests.conftest import mostly_long
from tfamp import keras_internals
from tfamp.saving import asked, litert, onnx, quantizers, served, signature
from tfamp.saving import export as exporting

HAS_ONNX = all(
    importlib.util.find_spec(name)
    for name in ("onnx", "tf2onnx", "onnxruntime")
)
HAS_QUANTIZERS = HAS_ONNX and importlib.util.find_spec("litert_quantizer")
HAS_GPTQ = Version(keras.__version__) >= Version("3.15")
needs_onnx = pytest.mark.skipif(
    not HAS_ONNX, reason="tf2onnx, onnx and onnxruntime are not installed"
)
needs_quantizers = pytest.mark.skipif(
    not HAS_QUANTIZERS, reason="litert-quantizer or onnxruntime are missing"
)
pytestmark = [
    # Of the converters, of NumPy's next release.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ROWS = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
SUFFIX = {"saved_model": "", "litert": ".tflite", "onnx": ".onnx"}
LONG = pytest.mark.long
FORMATS = [
    "saved_model",
    pytest.param("litert", marks=LONG),
    pytest.param("onnx", marks=[needs_onnx, LONG]),
]


def gelu_model():
    inputs = keras.Input([4], name="x")
    x = layers.Dense(8, activation="gelu")(inputs)
    x = layers.BatchNormalization()(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(x))


def by_hand(model, x):
    """The model of `gelu_model` in float64."""
    kernel, bias, gamma, beta, mean, variance, head, head_bias = map(
        np.float64, model.get_weights()
    )
    x = x @ kernel + bias
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    x = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    x = np.exp(x @ head + head_bias)
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "format", ["litert", pytest.param("onnx", marks=[needs_onnx, LONG])]
)
def test_a_file_computes_in_float32_whatever_the_model_does(format, tmp_path):
    with tfamp.precision_scope("mixed_float16"):
        model = gelu_model()
    tfamp.keep_float32(model)
    before = model.predict_on_batch(ROWS)

    report = tfamp.export(
        model, tmp_path / f"m{SUFFIX[format]}", format, batch=ROWS
    )

    found = exporting.opened(report, model)(ROWS)[0]
    np.testing.assert_allclose(found, by_hand(model, ROWS), atol=1e-5)
    assert report.largest_difference < 1e-5
    assert np.abs(before - found).max() > 1e-5
    np.testing.assert_array_equal(model.predict_on_batch(ROWS), before)
    assert [each["dtype"] for each in report.inputs] == ["float32"]
    assert report.inputs[0]["shape"] == [None, 4]
    assert found.dtype == "float32"
    # Another size of batch than it was compared on.
    assert exporting.opened(report, model)(ROWS[:5])[0].shape == (5, 3)


def two_inputs():
    features = keras.Input([4], name="features")
    ids = keras.Input([3], dtype="int32", name="ids")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(5, 4)(ids))
    x = layers.Add()([features, x])
    return keras.Model(
        {"features": features, "ids": ids},
        {"y": layers.Dense(2)(x), "parts": [x, layers.Dense(3)(x)]},
    )


@pytest.mark.parametrize("format", FORMATS)
def test_names_structures_and_integers(format, tmp_path):
    with tfamp.precision_scope("mixed_bfloat16"):
        model = two_inputs()
    batch = {"features": ROWS, "ids": np.arange(18).reshape(6, 3) % 5}

    report = tfamp.export(
        model, tmp_path / f"m{SUFFIX[format]}", format, batch=batch
    )

    assert {x["name"]: x["dtype"] for x in report.inputs} == {
        "features": "float32",
        "ids": "int32",
    }
    assert [x["name"] for x in report.outputs] == ["parts_0", "parts_1", "y"]
    run = exporting.opened(report, model)
    table = model.layers[1].get_weights()[0]
    expected = ROWS + table[batch["ids"]].mean(1)
    np.testing.assert_allclose(run(batch)[0], expected, atol=1e-6)


def test_the_batch_of_a_first_call_is_left_open():
    called = keras.Sequential([layers.Dense(2)])
    called(ROWS)
    meant = keras.Input(batch_shape=[6, 4])
    meant = keras.Model(meant, layers.Dense(2)(meant))
    recurrent = keras.Sequential([layers.SimpleRNN(2, unroll=True)])
    recurrent(ROWS[:, None])

    def batch_of(model, format):
        return signature.signature_of(model, None, format).shape[0]

    assert batch_of(called, "saved_model") is None
    assert batch_of(meant, "saved_model") == 6
    # LiteRT has no loop over a batch of any size.
    assert batch_of(recurrent, "litert") == 6
    assert batch_of(recurrent, "onnx") is None


def test_an_input_may_have_the_name_of_a_word_of_python():
    inputs = {"class": keras.Input([4], name="class")}
    model = keras.Model(inputs, layers.Dense(2)(inputs["class"]))
    assert signature.signature_of(model)["class"].name == "input_class"


def test_a_call_of_several_arguments_is_refused():
    class Two(keras.Model):
        def call(self, a, b, training=False):
            return a + b

    model = Two()
    model(ROWS, ROWS)
    with pytest.raises(tfamp.InputError, match="takes a, b, and"):
        signature.signature_of(model)


def test_of_an_error_the_reason_is_said():
    class Failing(layers.Layer):
        def call(self, x):
            raise TypeError("no such thing")

    with pytest.raises(TypeError) as error:
        Failing()(ROWS)
    assert asked.first_line(error.value) == "no such thing"


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = keras.Sequential(
            [layers.Dense(4), layers.RMSNormalization()]
        )

    def call(self, x):
        shifted = x["a"] + keras.ops.cast(x["b"], self.compute_dtype)
        return self.inner(shifted)


def inputs_in_16_bits():
    inputs = keras.Input([4], dtype="float16")
    x = keras.ops.cast(layers.Dense(4)(inputs), "float16")
    x = keras.ops.softmax(x * keras.ops.ones([4], dtype="float16"))
    return keras.Model(inputs, layers.Dense(2)(x))


def weights_in_16_bits():
    stored = keras.DTypePolicy("bfloat16")
    return keras.Sequential(
        [keras.Input([4]), layers.Dense(4, dtype=stored), layers.Dense(2)]
    )


def reversed_embedding():
    table = layers.ReversibleEmbedding(7, 4, reverse_dtype="bfloat16")
    ids = keras.Input([3], dtype="int32")
    return keras.Model(ids, table(table(ids), reverse=True))


def attention():
    inputs = keras.Input([5, 4])
    x = layers.LayerNormalization()(inputs)
    x = layers.MultiHeadAttention(2, 2)(x, x, use_causal_mask=True)
    return keras.Model(inputs, layers.Add()([inputs, x]))


def convolutions():
    return keras.Sequential(
        [
            keras.Input([6, 6, 2]),
            layers.Conv2D(4, 1),
            layers.BatchNormalization(),
            layers.SeparableConv2D(4, 3, padding="same"),
            # Keras has XLA compile these, and hides them in a function.
            layers.Conv2D(4, 3, groups=2),
            layers.GroupNormalization(2),
            layers.GlobalMaxPooling2D(),
        ]
    )


def subclassed():
    model = Subclassed()
    model(pairs())
    return model


def pairs():
    return {"a": ROWS, "b": np.arange(24, dtype="int32").reshape(6, 4)}


KINDS = [
    (make, format)
    for make in (
        inputs_in_16_bits,
        weights_in_16_bits,
        reversed_embedding,
        attention,
        convolutions,
        subclassed,
    )
    for format in SUFFIX
]


@pytest.mark.parametrize(
    ("make", "format"),
    mostly_long(
        KINDS,
        always=[(weights_in_16_bits, "saved_model"), (attention, "litert")],
    ),
)
def test_models_of_many_kinds(make, format, tmp_path):
    if format == "onnx" and not HAS_ONNX:
        pytest.skip("tf2onnx, onnx and onnxruntime are not installed")
    with tfamp.precision_scope("mixed_bfloat16"):
        model = make()
    tfamp.keep_float32(model, outputs=False)
    tfamp.optimize(model)
    batch = pairs() if make is subclassed else None

    report = tfamp.export(
        model, tmp_path / f"m{SUFFIX[format]}", format, batch=batch
    )

    assert report.largest_difference < 1e-5
    # What stood beside the policies is back.
    assert model.compute_dtype == "bfloat16"


def test_an_operation_of_16_bits_that_is_left_is_refused(tmp_path):
    @keras.saving.register_keras_serializable(package="test_export")
    class Rounding(layers.Layer):
        def call(self, x):
            return keras.ops.sqrt(keras.ops.cast(x, "float16"))

    model = keras.Sequential([keras.Input([4]), Rounding(name="rounding")])

    with pytest.raises(
        tfamp.InputError, match="'rounding' computes in float16"
    ):
        tfamp.export(model, tmp_path / "m")

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault", mostly_long(["open", "run", "shape"], always=["run"])
)
def test_a_file_that_does_not_run_is_not_left(fault, tmp_path, monkeypatch):
    def opened(path, inputs, outputs):
        assert pathlib.Path(path).exists()
        if fault == "open":
            raise ValueError("no such operation")

        def run(rows):
            if fault == "run":
                raise RuntimeError("out of range")
            return [np.zeros([1, 1], "float32")]

        return run

    monkeypatch.setitem(exporting._OPEN, "litert", opened)
    path = tmp_path / "m.tflite"
    path.write_bytes(b"the former one")

    with pytest.raises(tfamp.InputError, match="as litert"):
        tfamp.export(gelu_model(), path, "litert")

    assert path.read_bytes() == b"the former one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_differs_by_more_is_refused_with_its_layer(tmp_path, monkeypatch):
    model = keras.Sequential(
        [
            keras.Input([4]),
            layers.Dense(4, name="first"),
            layers.Dense(4, name="second"),
            layers.Dense(4, name="third"),
        ]
    )
    stored = served.write

    def rounded(model, *args):
        second = [each for each in model.layers if each.name == "second"]
        before = second[0].get_weights() if second else None
        if second:
            second[0].set_weights([1.1 * w for w in before])
        try:
            return stored(model, *args)
        finally:
            if second:
                second[0].set_weights(before)

    monkeypatch.setattr(served, "write", rounded)

    with pytest.raises(tfamp.InputError, match="from layer 'second' on"):
        tfamp.export(model, tmp_path / "m")

    assert not list(tmp_path.iterdir())


def test_a_model_that_draws_at_inference_is_refused(tmp_path):
    class Noisy(layers.Layer):
        def __init__(self):
            super().__init__()
            self.seed = keras.random.SeedGenerator(1)

        def call(self, x):
            return x + keras.random.normal([4], seed=self.seed)

    model = keras.Sequential([keras.Input([4]), Noisy()])
    with pytest.raises(tfamp.InputError, match="draws random numbers"):
        tfamp.export(model, tmp_path / "m")


def test_erfc_is_written_with_erf():
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None], "x")
        tf.math.erfc(x, name="y")
    definition = graph.as_graph_def()
    onnx.write_erfc_with_erf(definition)
    assert {node.op for node in definition.node} >= {"Erf", "Sub"}
    assert "Erfc" not in {node.op for node in definition.node}
    values = np.linspace(-3, 3, 13, dtype="float32")
    with tf.Graph().as_default() as again:
        tf.import_graph_def(definition, name="")
        with tf.compat.v1.Session(graph=again) as session:
            found = session.run("y:0", {"x:0": values})
    expected = [math.erfc(each) for each in values]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"format": "onxx"}, "Unknown format"),
        ({"format": "litert"}, "must end in .tflite"),
        ({"precision": "float64"}, "float64"),
        ({"quantize": "int3"}, "int3"),
        ({"quantize": "int8"}, "no quantizer of a SavedModel"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"format": "litert", "path": "m.tflite", "quantize": "gptq"}, "GPTQ"),
        (
            {"format": "keras", "path": "m.keras", "quantize": "gptq"},
            "GPTQ|fits",
        ),
    ],
)
def test_arguments_that_cannot_be(arguments, said, tmp_path):
    model = keras.Sequential([keras.Input([4]), layers.Dense(2)])
    path = tmp_path / arguments.pop("path", "m")
    with pytest.raises((tfamp.InputError, ValueError), match=said):
        tfamp.export(model, path, **arguments)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_said_with_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = keras.Sequential([keras.Input([4]), layers.Dense(2)])
    for path, format, quantize in (
        ("m.onnx", "onnx", None),
        ("m.tflite", "litert", "int8"),
    ):
        with pytest.raises(
            tfamp.InputError, match=r"pip install 'tfamp\[export"
        ):
            tfamp.export(model, tmp_path / path, format, quantize=quantize)


def planted():
    """A product whose kernel is a number of int8 at scale 1."""
    model = keras.Sequential(
        [keras.Input([2]), layers.Dense(1, use_bias=False, name="planted")]
    )
    model.set_weights([np.float32([[127], [-64]])])
    return model


def stored_kernel(report):
    """The kernel in a file, as numbers times scale."""
    if report.format == "keras":
        layer = tfamp.load_model(report.path, compile=False).layers[-1]
        return np.float32(layer._kernel) / np.float32(layer.kernel_scale)
    if report.format == "litert":
        runner = litert.interpreter(report.path)
        found = [
            np.float32(runner.get_tensor(each["index"]))
            * each["quantization_parameters"]["scales"][0]
            for each in runner.get_tensor_details()
            if each["dtype"] is np.int8
            and each["quantization_parameters"]["scales"].size
            and sorted(each["shape"]) == [1, 2]
        ]
        return found[0]
    import onnx as onnx_format
    from onnx import numpy_helper

    arrays = {
        each.name: numpy_helper.to_array(each)
        for each in onnx_format.load(report.path).graph.initializer
    }
    (kernel,) = [
        x for x in arrays.values() if x.dtype == "int8" and x.size == 2
    ]
    (scale,) = [
        x
        for name, x in arrays.items()
        if "scale" in name and kernel.shape[-1:] in (x.shape, (1,))
    ][:1]
    return np.float32(kernel) * scale


@pytest.mark.parametrize(
    "format",
    [
        "keras",
        pytest.param("litert", marks=[needs_quantizers, LONG]),
        pytest.param("onnx", marks=[needs_quantizers, LONG]),
    ],
)
def test_a_kernel_of_integers_comes_back_exactly_from_int8(format, tmp_path):
    suffix = asked.SUFFIXES[format]
    # Activations are rounded to a 255th of their range.
    batch = np.float32([[1, 0], [0, 1], [1, 1], [-1, 1]])
    report = tfamp.export(
        planted(), tmp_path / f"m{suffix}", format, quantize="int8", batch=batch
    )

    assert report.quantized_share == 1.0
    np.testing.assert_array_equal(
        stored_kernel(report).reshape(-1), [127.0, -64.0]
    )
    found = exporting.opened(report, planted())(batch)[0]
    np.testing.assert_allclose(
        found.reshape(-1), [127, -64, 63, -191], rtol=5e-3
    )


@needs_quantizers
@pytest.mark.parametrize("format", ["litert", "onnx"])
@pytest.mark.parametrize("kind", ["float16", "int8", "static", "int4"])
@pytest.mark.long
def test_each_quantizer_stores_less_and_returns_float32(format, kind, tmp_path):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input([64]), layers.Dense(64, "relu"), layers.Dense(64)]
    )
    rows = np.random.default_rng(0).normal(size=(16, 64)).astype("float32")
    path = tmp_path / f"m{SUFFIX[format]}"
    plain = tfamp.export(model, path, format, batch=rows)
    expected = exporting.opened(plain, model)(rows)[0]

    report = tfamp.export(
        model,
        path,
        format,
        quantize="int8" if kind == "static" else kind,
        calibration=rows if kind == "static" else None,
        batch=rows,
    )

    assert report.is_static == (kind == "static")
    share = {"float16": 0.6, "int8": 0.4, "static": 0.4, "int4": 0.35}
    assert report.bytes < share[kind] * plain.bytes * 1.3
    assert report.quantized_share > 0.9
    found = exporting.opened(report, model)(rows)[0]
    assert found.dtype == "float32"
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < (0.5 if kind == "int4" else 0.05)


@needs_quantizers
@pytest.mark.parametrize("format", ["litert", "onnx", "keras"])
@pytest.mark.long
def test_layers_can_stay_in_float(format, tmp_path):
    model = keras.Sequential(
        [
            keras.Input([32]),
            layers.Dense(32, name="kept"),
            layers.Dense(32, name="rounded"),
        ]
    )
    path = tmp_path / f"m{asked.SUFFIXES[format]}"
    whole = tfamp.export(model, path, format, quantize="int8")
    report = tfamp.export(model, path, format, quantize="int8", keep=["kept"])
    assert whole.quantized_share > 0.9
    assert 0.4 < report.quantized_share < 0.6


@keras.saving.register_keras_serializable(package="test_export")
class Making(layers.Layer):
    """Gives the layer that it makes no policy."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, name="dense")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4", "gptq"])
def test_layers_in_layers_are_loaded_as_they_were_quantized(kind, tmp_path):
    if kind == "gptq" and not HAS_GPTQ:
        pytest.skip(f"not tried with Keras {keras.__version__}")
    inputs = keras.Input([5, 4])
    x = layers.MultiHeadAttention(2, 2, name="attention")(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(4)(Making(name="making")(x)))
    rows = np.random.default_rng(0).normal(size=(8, 5, 4)).astype("float32")

    report = tfamp.export(
        model,
        tmp_path / "m.keras",
        "keras",
        quantize=kind,
        calibration=rows,
        batch=rows,
    )

    loaded = tfamp.load_model(report.path)
    modes = {
        each.path: each.quantization_mode
        for each in keras_internals.all_layers(loaded)
        if not keras_internals.sublayers(each)
    }
    assert modes["attention/query"] == kind
    assert modes["making/dense"] is None
    # Four kernels of attention and one more, of all six and their biases.
    assert report.quantized_share == pytest.approx(80 / 120)
    assert report.relative_difference < (0.05 if kind == "int8" else 0.5)


def test_a_layer_to_keep_that_is_not_there_is_refused():
    with pytest.raises(tfamp.InputError, match="'no_such'"):
        quantizers.layer_names(planted(), ["no_such"])
