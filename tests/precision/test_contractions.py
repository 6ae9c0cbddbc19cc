"""Products that are none of matrices: outer ones, and those of vectors."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from tfamp.precision import contractions
from tfamp.precision.keep_float32 import keep_float32

ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
POSITIONS = np.arange(1000, 1064)
FREQUENCIES = 100.0 ** (-np.arange(4) / 4)
# Of two vectors, by the function or the operator that somebody may call.
OUTER = {
    "outer": ops.outer,
    "einsum": lambda a, b: ops.einsum("i,j->ij", a, b),
    "einsum of no result": lambda a, b: ops.einsum("i,j", a, b),
    "einsum of rows": lambda a, b: ops.einsum("xi,j->xij", a[None], b)[0],
    "einsum with an ellipsis": lambda a, b: ops.einsum(
        "...i,j->...ij", a[None], b
    )[0],
    "einsum of columns": lambda a, b: ops.einsum(
        "ik,jk->ij", a[:, None], b[:, None]
    ),
    "matmul": lambda a, b: ops.matmul(a[:, None], b[None]),
    "dot": lambda a, b: ops.dot(a[:, None], b[None]),
    "tensordot": lambda a, b: ops.tensordot(a, b, axes=0),
    "@": lambda a, b: a[:, None] @ b[None],
    "tf.einsum": lambda a, b: tf.einsum("i,j->ij", a, b),
    "tf.matmul": lambda a, b: tf.matmul(
        a[:, None], b[:, None], transpose_b=True
    ),
    "tf.tensordot": lambda a, b: tf.tensordot(a, b, axes=0),
}
# Of each row with itself.
SQUARED_NORM = {
    "einsum": lambda x: ops.einsum("ij,ij->i", x, x),
    "einsum with an ellipsis": lambda x: ops.einsum("...d,...d->...", x, x),
    "matmul": lambda x: ops.matmul(x[:, None], x[:, :, None])[:, 0, 0],
    "@": lambda x: (x[:, None] @ x[:, :, None])[:, 0, 0],
    "vdot": lambda x: ops.stack([ops.vdot(x[i], x[i]) for i in range(4)]),
    "dot": lambda x: ops.stack([ops.dot(x[i], x[i]) for i in range(4)]),
    "tensordot": lambda x: ops.stack(
        [ops.tensordot(x[i], x[i], 1) for i in range(4)]
    ),
    "tf.einsum": lambda x: tf.einsum("ij,ij->i", x, x),
    "tf.matmul": lambda x: tf.matmul(x[:, None], x[:, None], transpose_b=True)[
        :, 0, 0
    ],
}


class Own(layers.Layer):
    def __init__(self, code):
        super().__init__()
        self.code = code

    def call(self, x):
        return self.code(x)


def outputs_of(code, x, dtype):
    """What a kept layer with such a `call` returns, in float64."""
    keras.config.set_dtype_policy(f"mixed_{dtype}")
    inputs = keras.Input(x.shape[1:], batch_size=len(x))
    model = keras.Model(inputs, Own(code)(inputs))
    assert keep_float32(model, outputs=False)
    for run in (model, tf.function(model)):
        result = run(tf.constant(x, "float32"))
        yield np.asarray(tf.cast(result, "float32"), "float64")


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", OUTER)
def test_angles_by_an_outer_product_are_those_of_float64(name, dtype):
    def rotated(x):
        positions = ops.cast(ops.arange(1000, 1064), x.dtype)
        frequencies = ops.cast(FREQUENCIES, x.dtype)
        return ops.cos(OUTER[name](positions, frequencies)) * x

    x = np.ones((64, 4))
    right = np.cos(np.outer(POSITIONS, FREQUENCIES))
    for found in outputs_of(rotated, x, dtype):
        np.testing.assert_allclose(found, right, atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", SQUARED_NORM)
def test_a_norm_by_a_product_is_that_of_float64(name, dtype):
    def normalized(x):
        return x * ops.rsqrt(SQUARED_NORM[name](x) / 512 + 1e-6)[:, None]

    # Halves of whole numbers: the layer's inputs are exact in 16 bits.
    x = np.random.default_rng(0).integers(-250, 250, (4, 512)) * 2.0
    right = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True))
    for found in outputs_of(normalized, x, dtype):
        np.testing.assert_allclose(found, right, rtol=ROUNDING[dtype])


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("einsum", ("bid,bjd->bij", (8, 3, 4), (8, 5, 4)), "product"),
        ("einsum", ("bid,bjd->bij", (None, 3, 4), (None, 5, 4)), "product"),
        ("einsum", ("...d,de->...e", (8, 3, 4), (4, 5)), "product"),
        ("einsum", ("abc,cde->abde", (8, 3, 4), (4, 2, 2)), "product"),
        # One row for many columns: the columns are used once, the row often.
        ("einsum", ("bd,bjd->bj", (8, 4), (8, 5, 4)), "product"),
        ("einsum", ("bqd,bkd->bqk", (8, 1, 4), (8, 5, 4)), "product"),
        ("einsum", ("ij,jk,kl->il", (2, 3), (3, 4), (4, 5)), "product"),
        ("einsum", ("bid,bid->bi", (None, None, 4), (None, 3, 4)), "sum"),
        ("einsum", ("...d,...d->...", (8, 3, 4), (8, 3, 4)), "sum"),
        ("einsum", ("ij,ij", (3, 4), (3, 4)), "sum"),
        ("einsum", ("abc->ac", (8, 3, 4)), "sum"),
        ("einsum", ("ii->", (4, 4)), "sum"),
        ("einsum", ("abc->cab", (8, 3, 4)), "multiplication"),
        ("einsum", ("ij,j->ij", (3, 4), (4,)), "multiplication"),
        ("einsum", ("i,j,k->ijk", (3,), (4,), (5,)), "multiplication"),
        ("matmul", ((8, 3, 4), (8, 4, 5)), "product"),
        ("matmul", ((3, 4), (8, 4, 5)), "product"),
        ("matmul", ((None, 4), (4, 1)), "product"),
        ("matmul", ((None, None), (None, None)), "product"),
        ("matmul", ((4,), (4, 5)), "product"),
        ("matmul", ((4,), (4,)), "sum"),
        ("matmul", ((8, 1, 4), (8, 4, 1)), "sum"),
        ("matmul", ((8, 3, 1), (8, 1, 5)), "multiplication"),
        ("matmul", ((8, 1, 3), (8, 1, 5), True), "multiplication"),
        ("matmul", ((8, 4, 3), (8, 4, 5), True), "product"),
        ("dot", ((3, 4), (8, 4, 5)), "product"),
        ("dot", ((3, 4), ()), "multiplication"),
        ("dot", ((4,), (4,)), "sum"),
        ("inner", ((3, 4), (5, 4)), "product"),
        ("inner", ((4,), (4,)), "sum"),
        ("inner", ((), (4,)), "multiplication"),
        ("vdot", ((4,), (4,)), "sum"),
        ("tensordot", ((3, 4), (4, 5), 1), "product"),
        ("tensordot", ((3, 4), (4, 5), [[1], [0]]), "product"),
        ("tensordot", ((3, 4), (3, 4), 2), "sum"),
        ("tensordot", ((3, 4), (3, 4), [[0, 1], [0, 1]]), "sum"),
        ("tensordot", ((3, 4), (4, 3), [[0, 1], [1, 0]]), "sum"),
        ("tensordot", ((3,), (4,), 0), "multiplication"),
        ("outer", ((3,), (4,)), "multiplication"),
        ("kron", ((3,), (4,)), "multiplication"),
        ("conv", ((2, 8, 8, 3), (3, 3, 3, 4)), "product"),
    ],
)
def test_what_a_product_is(name, call, expected):
    args = [
        tf.TensorSpec(each) if isinstance(each, tuple) else each
        for each in call
    ]
    assert contractions.kind(name, args, {}, False) == expected


def test_a_reflected_operator_has_its_operands_in_the_other_order():
    row, column = tf.TensorSpec((1, 4)), tf.TensorSpec((4, 1))
    assert contractions.kind("matmul", (row, column), {}, False) == "sum"
    both = contractions.kind("matmul", (row, column), {}, True)
    assert both == "multiplication"


def test_a_call_that_is_wrong_is_left_to_the_function():
    vector = tf.TensorSpec((4,))
    for args in (("ij->i", vector, vector), ("ij", vector), (vector,), ()):
        assert contractions.kind("einsum", args, {}, False) == "product"
    unknown = tf.TensorSpec(None)
    assert contractions.kind("matmul", (unknown, unknown), {}, False) == (
        "product"
    )
