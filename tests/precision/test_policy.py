import subprocess
import sys

import keras
import pytest
from keras import layers

from tfamp.errors import InputError
from tfamp.hardware import devices as hardware
from tfamp.layers.float8 import float8
from tfamp.precision.policy import precision_of, precision_scope, set_precision

COMPUTE_DTYPES = {
    "float32": "float32",
    "mixed_bfloat16": "bfloat16",
    "mixed_float16": "float16",
}


def pretend_hardware(monkeypatch, kind):
    devices = {
        "tpu": hardware.Hardware("tpu", ("TPU v5e",)),
        "gpu": hardware.Hardware("gpu", ("V100",), compute_capability=(7, 0)),
    }
    monkeypatch.setattr(hardware, "detect_hardware", lambda: devices[kind])


@pytest.mark.parametrize("name", COMPUTE_DTYPES)
def test_a_precision_computes_in_its_dtype_and_keeps_float32_variables(name):
    assert set_precision(name) == name
    layer = layers.Dense(1)
    assert layer.compute_dtype == COMPUTE_DTYPES[name]
    assert layer.variable_dtype == "float32"


@pytest.mark.parametrize(
    ("kind", "precision"), [("tpu", "mixed_bfloat16"), ("gpu", "mixed_float16")]
)
def test_auto_sets_and_returns_what_the_hardware_recommends(
    kind, precision, monkeypatch
):
    pretend_hardware(monkeypatch, kind)
    assert set_precision("auto") == precision
    assert keras.config.dtype_policy().name == precision
    keras.config.set_dtype_policy("float32")
    assert set_precision() == precision


def test_float8_is_a_precision_on_bfloat16():
    assert set_precision("float8") == "float8"
    assert keras.config.dtype_policy().name == "mixed_bfloat16"
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    assert precision_of(model) == "mixed_bfloat16"
    float8(model, skip="none")
    assert precision_of(model) == "float8"


def test_mixed_float16_on_a_tpu_is_an_error_that_names_the_fix(monkeypatch):
    pretend_hardware(monkeypatch, "tpu")
    with pytest.raises(InputError, match=r"TPU.*'mixed_bfloat16'"):
        set_precision("mixed_float16")
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("name", ["float16", "fp8", "", None, 16])
def test_an_unknown_precision_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(
        InputError,
        match="one of auto, float32, mixed_bfloat16, mixed_float16",
    ):
        set_precision(name)
    with pytest.raises(InputError), precision_scope(name):
        pass
    assert keras.config.dtype_policy().name == "float32"


def test_a_scope_restores_the_former_policy_also_after_an_exception():
    former = keras.dtype_policies.DTypePolicyMap(
        keras.DTypePolicy("mixed_bfloat16")
    )
    keras.config.set_dtype_policy(former)
    with precision_scope("mixed_float16") as precision:
        assert precision == "mixed_float16"
        assert layers.Dense(1).compute_dtype == "float16"
        with precision_scope("float32"):
            assert layers.Dense(1).compute_dtype == "float32"
        assert layers.Dense(1).compute_dtype == "float16"
    assert keras.config.dtype_policy() is former
    with pytest.raises(KeyError), precision_scope("float32"):
        raise KeyError
    assert keras.config.dtype_policy() is former


@pytest.mark.parametrize("name", COMPUTE_DTYPES)
def test_the_precision_of_a_model_is_that_of_its_layers(name):
    with precision_scope(name):
        model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    assert precision_of(model) == name


def test_the_policy_of_a_model_around_its_layers_does_not_count():
    dense = layers.Dense(2, dtype="float32")
    set_precision("mixed_float16")
    model = keras.Sequential([keras.Input((2,)), dense])
    assert model.dtype_policy.name == "mixed_float16"
    assert precision_of(model) == "float32"


def test_one_16_bit_layer_decides_and_float16_before_bfloat16():
    inputs = keras.Input((3, 2))
    nested = keras.Sequential(
        [keras.Input((3, 2)), layers.Dense(2, dtype="mixed_bfloat16")]
    )
    model = keras.Model(inputs, nested(layers.Dense(2)(inputs)))
    assert precision_of(model) == "mixed_bfloat16"
    attention = layers.MultiHeadAttention(1, 2, dtype="mixed_float16")
    model = keras.Model(inputs, model(attention(inputs, inputs)))
    assert precision_of(model) == "mixed_float16"


def test_a_policy_map_counts_layer_by_layer():
    policy_map = keras.dtype_policies.DTypePolicyMap(
        keras.DTypePolicy("float32"),
        {"second": keras.DTypePolicy("mixed_float16")},
    )
    keras.config.set_dtype_policy(policy_map)
    inputs = keras.Input((2,))
    first = layers.Dense(2, name="first")(inputs)
    assert precision_of(keras.Model(inputs, first)) == "float32"
    second = layers.Dense(2, name="second")(first)
    assert precision_of(keras.Model(inputs, second)) == "mixed_float16"


def test_a_quantized_model_has_the_precision_it_was_quantized_from():
    set_precision("mixed_bfloat16")
    model = keras.Sequential([keras.Input((16,)), layers.Dense(16)])
    model.layers[0].quantize("float8")
    assert precision_of(model) == "mixed_bfloat16"


def test_importing_the_module_imports_neither_keras_nor_tensorflow():
    program = (
        "import sys, tfamp.precision.policy\n"
        "assert not {'keras', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
