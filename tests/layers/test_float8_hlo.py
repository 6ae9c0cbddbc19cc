"""What XLA for GPUs gets: products of two factors that it knows as 8 bits."""

import re

import keras
import pytest
import tensorflow as tf
from keras import layers

import tfamp
from tests.conftest import mostly_long

LAYERS = {
    "dense": ((16, 64), lambda: layers.Dense(32)),
    "einsum": (
        (16, 64),
        lambda: layers.EinsumDense("abc,cde->abde", (None, 4, 16)),
    ),
    "attention_output": (
        (16, 4, 16),
        lambda: layers.EinsumDense("abcd,cde->abe", (None, 64)),
    ),
    "pointwise": ((8, 8, 64), lambda: layers.Conv2D(32, 1)),
    "conv": ((8, 8, 64), lambda: layers.Conv2D(32, 3, padding="same")),
    "conv1d": ((16, 64), lambda: layers.Conv1D(32, 3)),
    "conv3d": ((4, 4, 4, 16), lambda: layers.Conv3D(16, 2)),
}
# What the products of XLA's rewriter may have before them.
_MOVES = ("reshape", "transpose", "copy", "bitcast", "slice", "reverse")


def hlo_of_a_step(make_layer, shape):
    """Forward and backward pass, for a GPU that need not be here."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential([keras.Input(shape), make_layer()])
    tfamp.float8(model, skip="none", history=4)

    def step(weights, x):
        state = list(zip(model.trainable_variables, weights, strict=True))
        with tf.GradientTape() as tape:
            tape.watch([weights, x])
            with keras.StatelessScope(state_mapping=state):
                outputs = tf.cast(model(x), tf.float32)
            loss = tf.reduce_sum(outputs**2)
        return tape.gradient(loss, [weights, x])

    weights = [tf.convert_to_tensor(v.value) for v in model.trainable_variables]
    compiled = tf.function(step, jit_compile=True, autograph=False)
    x = tf.zeros((16, *shape), tf.bfloat16)
    ir = compiled.experimental_get_compiler_ir(weights, x)
    return ir(stage="hlo", platform_name="GPU")


def products(hlo):
    """The 8-bit formats of the two factors of each product."""
    found = {}
    for line in hlo.splitlines():
        match = re.match(
            r"\s*(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[[^ ]* ([\w\-]+)\((.*?)\)",
            line,
        )
        if match:
            name, dtype, operation, operands = match.groups()
            names = re.findall(r"%([\w.\-]+)", operands)
            found[name] = dtype, operation, names

    def format_of(name):
        _, operation, operands = found[name]
        while operation in _MOVES:
            _, operation, operands = found[operands[0]]
        assert operation == "multiply", operation
        kinds = {found[each][1]: each for each in operands}
        assert set(kinds) == {"convert", "broadcast"}
        return found[found[kinds["convert"]][2][0]][0]

    return {
        tuple(map(format_of, operands[:2]))
        for _, operation, operands in found.values()
        if operation in ("dot", "convolution")
    }


@pytest.mark.parametrize(
    "name", mostly_long(LAYERS, always=["dense", "attention_output"])
)
def test_both_factors_of_all_products_are_8_bits_times_a_scalar(name):
    shape, make = LAYERS[name]
    found = products(hlo_of_a_step(make, shape))
    forward, gradient = ("f8e4m3fn", "f8e4m3fn"), {"f8e4m3fn", "f8e5m2"}
    assert forward in found
    backward = found - {forward}
    assert backward
    assert all(set(formats) == gradient for formats in backward)
