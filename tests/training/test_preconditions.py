"""Who decides whether XLA compiles: `jit`, `compile`, or neither."""

import keras
import pytest
import tensorflow as tf

import tfamp
from tfamp import tensorflow_internals
from tfamp.hardware.devices import Hardware
from tfamp.training import preconditions

GPU = ["/device:GPU:0"]


def compiled_model(jit_compile="auto"):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=jit_compile)
    return model


def test_muon_of_a_keras_in_which_it_fails_is_refused(monkeypatch):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(tfamp.wrap_optimizer(keras.optimizers.Muon()), "mse")
    monkeypatch.setattr(keras, "__version__", "3.12.1")
    with pytest.raises(tfamp.InputError, match=r"keras>=3\.13.*AdamW"):
        tfamp.fit(model, tf.ones([2, 2]), tf.ones([2, 1]))


@pytest.mark.parametrize(
    ("made", "lines"),
    [
        (lambda: keras.layers.DepthwiseConv1D(15), 1),
        (lambda: keras.layers.SeparableConv2D(4, (1, 31)), 1),
        (lambda: keras.layers.DepthwiseConv2D((31, 7)), 0),
        (lambda: keras.layers.DepthwiseConv1D(31, dtype="float32"), 0),
        (lambda: keras.layers.Conv1D(4, 31), 0),
    ],
    ids=["1D", "separable", "narrow", "float32", "dense"],
)
@pytest.mark.parametrize("instructions", [("avx512_bf16",), ()], ids=str)
def test_kernels_that_tensorflow_never_makes_are_said(
    made, lines, instructions, monkeypatch, warnings_of_absl
):
    cpu = Hardware("cpu", ("a CPU",), cpu_bf16=instructions)
    monkeypatch.setattr(preconditions, "detect_hardware", lambda: cpu)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = made()
    preconditions.warn_of_endless_kernels(
        keras.Sequential([layer]), tf.distribute.get_strategy()
    )
    assert len(warnings_of_absl) == (lines if instructions else 0)


def resolve(jit, model, is_custom=False):
    return preconditions.resolve_jit(
        jit, model, tf.distribute.get_strategy(), is_custom
    )


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(preconditions, "devices_of", lambda strategy: GPU)
    monkeypatch.setattr(
        keras.Model, "_resolve_auto_jit_compile", lambda self: True
    )


def test_auto_compiles_on_a_gpu_but_not_where_bits_must_repeat(
    on_a_gpu, monkeypatch
):
    model = compiled_model()
    assert resolve("auto", model) is True
    monkeypatch.setattr(
        tensorflow_internals, "is_op_determinism_enabled", lambda: True
    )
    assert resolve("auto", model) is False
    assert resolve(True, model) is True


def test_what_compile_was_told_is_obeyed(on_a_gpu):
    assert resolve("auto", compiled_model(False)) is False


def test_true_of_compile_is_obeyed_on_a_cpu():
    assert resolve("auto", compiled_model(True)) is True
    assert resolve("auto", compiled_model()) is False


def test_true_of_compile_that_cannot_be_is_said(warnings_of_absl):
    assert resolve("auto", compiled_model(True), is_custom=True) is False
    (line,) = warnings_of_absl
    assert "overrides train_step: trains without XLA" in line


def test_a_contradiction_is_one_line():
    with pytest.raises(tfamp.InputError, match="jit=False contradicts"):
        resolve(False, compiled_model(True))
    assert resolve(True, compiled_model(True)) is True


def test_false_of_compile_contradicts_jit_on_a_gpu(on_a_gpu):
    with pytest.raises(tfamp.InputError, match="jit_compile=False"):
        resolve(True, compiled_model(False))


@pytest.mark.parametrize("door", [tfamp.fit, tfamp.evaluate, tfamp.predict])
def test_a_call_from_a_graph_is_one_line(door):
    model = compiled_model()
    data = tf.data.Dataset.from_tensors((tf.zeros([2, 2]), tf.zeros([2, 1])))

    @tf.function(autograph=False)
    def in_a_graph():
        door(model, data)

    with pytest.raises(tfamp.InputError, match=f"tfamp.{door.__name__} was"):
        in_a_graph()
