"""The count of what a step keeps, on models that can be counted by hand."""

import keras
import numpy as np
import pytest
from keras import layers

import tfamp
from benchmarks import kept_bytes

ROWS = 3


def kept_by(stack, features=4):
    inputs = keras.Input((features,))
    x = inputs
    for layer in stack:
        x = layer(x)
    model = keras.Model(inputs, x)
    model.compile(
        tfamp.wrap_optimizer(keras.optimizers.SGD()),
        loss="mse",
        auto_scale_loss=False,
    )
    return kept_bytes.kept_bytes(
        model, np.zeros((ROWS, features), "float32"), np.zeros((ROWS, 2))
    )


def by_shape(kept):
    return sorted((each.shape, each.dtype) for each in kept.tensors)


def two_products():
    return [
        layers.Dense(8, activation="relu", use_bias=False),
        layers.Dense(2, use_bias=False, dtype="float32", name="head"),
    ]


def test_inputs_and_variables_do_not_count_and_a_tensor_counts_once():
    kept = kept_by(two_products())
    # What ReLU made, which its own gradient and the next product need, and
    # the outputs for the squared error. Its kernels are variables.
    assert by_shape(kept) == [((ROWS, 2), "float32"), ((ROWS, 8), "float32")]
    assert kept.total == kept.in_float32 == 4 * ROWS * (2 + 8)
    assert kept.of_weights == 0


def test_16_bit_copies_count_and_those_of_weights_are_told_apart():
    keras.config.set_dtype_policy("mixed_bfloat16")
    kept = kept_by([*two_products(), layers.Dense(2, use_bias=False)])
    head, last = (8, 2), (2, 2)
    assert by_shape(kept) == sorted(
        [
            ((ROWS, 4), "bfloat16"),
            ((ROWS, 8), "bfloat16"),
            ((ROWS, 8), "float32"),
            ((ROWS, 2), "bfloat16"),
            ((ROWS, 2), "float32"),
            (last, "bfloat16"),
        ]
    )
    assert head not in {each.shape for each in kept.tensors}
    assert kept.of_weights == 2 * 2 * 2


def test_views_of_a_tensor_count_once():
    plain = kept_by(two_products())
    reshaped = kept_by(
        [
            *two_products()[:1],
            layers.Reshape((2, 4)),
            layers.Flatten(),
            *two_products()[1:],
        ]
    )
    assert reshaped.total == plain.total


def test_the_description_adds_alike_tensors_up():
    text = kept_bytes.describe(kept_by(two_products(), features=4), largest=1)
    assert f"{4 * ROWS * (2 + 8) / 2**20:.1f} MiB kept" in text
    assert f"1 x float32 [{ROWS}, 8]" in text
    assert f"[{ROWS}, 2]" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch norm", "rms norm"])
def test_optimized_norms_keep_no_float32_of_16_bit_activations(name):
    keras.config.set_dtype_policy("mixed_bfloat16")
    norm = {
        "batch norm": layers.BatchNormalization,
        "rms norm": layers.RMSNormalization,
    }[name]()
    inputs = keras.Input((4, 4, 3))
    x = norm(layers.Conv2D(64, 3, use_bias=False)(inputs))
    x = layers.GlobalAveragePooling2D()(layers.Activation("relu")(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.compile("sgd", "mse")
    batch = np.zeros((ROWS, 4, 4, 3)), np.zeros((ROWS, 2))

    def large():
        kept = kept_bytes.kept_bytes(model, *batch)
        return [e for e in kept.tensors if e.shape == (ROWS, 2, 2, 64)]

    assert "float32" in {each.dtype for each in large()}
    tfamp.optimize(model)
    assert {each.dtype for each in large()} == {"bfloat16"}
