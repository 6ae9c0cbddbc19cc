"""Each kind of data that `Model.fit` takes, on one device and on replicas."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_slow

ROWS = 22
A = np.random.default_rng(0).normal(size=(ROWS, 2)).astype("float32")
B = np.random.default_rng(1).normal(size=(ROWS, 3)).astype("float32")
Y = A[:, :1] - B[:, :1] * B[:, 1:2]
SIZE = 8
pytestmark = pytest.mark.filterwarnings("ignore")


def of_pandas():
    pandas = pytest.importorskip("pandas")
    return (
        {"a": pandas.DataFrame(A), "b": pandas.DataFrame(B)},
        pandas.Series(Y[:, 0]),
    )


def of_torch():
    torch = pytest.importorskip("torch")
    rows = [({"a": a, "b": b}, y) for a, b, y in zip(A, B, Y, strict=True)]
    return (torch.utils.data.DataLoader(rows, batch_size=SIZE),)


def of_grain():
    grain = pytest.importorskip("grain")
    rows = [({"a": a, "b": b}, y) for a, b, y in zip(A, B, Y, strict=True)]
    return (grain.MapDataset.source(rows).to_iter_dataset().batch(SIZE),)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        at = slice(SIZE * index, SIZE * index + SIZE)
        return {"a": A[at], "b": B[at]}, Y[at]


def generator():
    dataset = Batches()
    return (dataset[index] for index in range(3))


KINDS = {
    "dict": lambda: ({"a": A, "b": B}, Y),
    "list": lambda: ([A, B], Y),
    "tensors": lambda: ([tf.constant(A), tf.constant(B)], tf.constant(Y)),
    "tf.data": lambda: (
        tf.data.Dataset.from_tensor_slices(({"a": A, "b": B}, Y)).batch(SIZE),
    ),
    "PyDataset": lambda: (Batches(),),
    "PyDataset with workers": lambda: (Batches(workers=2),),
    "generator": lambda: (generator(),),
    "pandas": of_pandas,
    "torch": of_torch,
    "grain": of_grain,
}


def build_model():
    keras.utils.set_random_seed(0)
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    inputs = {"a": a, "b": b}
    x = keras.layers.Concatenate()([a, b])
    outputs = keras.layers.Dense(1, kernel_initializer="ones")(x)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def trained(kind, strategy=None):
    """Weights, loss and outputs."""
    scope = contextlib.nullcontext() if strategy is None else strategy.scope()
    with scope:
        model = build_model()
    options = {"verbose": 0}
    if len(data := KINDS[kind]()) == 2:
        options["batch_size"] = SIZE
    # Keras draws the order of arrays and of a PyDataset.
    has_order = len(data) == 2 or kind.startswith("PyDataset")
    order = {"shuffle": False} if has_order else {}
    history = tfamp.fit(model, *data, **options, **order).history
    evaluated = tfamp.evaluate(model, *KINDS[kind](), **options)
    outputs = tfamp.predict(model, KINDS[kind]()[0], **options)
    return (
        *model.get_weights(),
        history["loss"],
        evaluated["loss"],
        outputs,
    )


def by_hand():
    """The same in float64."""
    x = np.concatenate([A, B], axis=1).astype("float64")
    weights, bias, errors = np.ones((5, 1)), np.zeros(1), []
    for begin in range(0, ROWS, SIZE):
        rows = x[begin : begin + SIZE]
        error = rows @ weights + bias - Y[begin : begin + SIZE]
        errors.append(error)
        weights = weights - 0.1 * 2 * rows.T @ error / len(rows)
        bias = bias - 0.1 * 2 * error.mean(axis=0)
    outputs = x @ weights + bias
    loss = np.mean(np.concatenate(errors) ** 2)
    return weights, bias, loss, np.mean((outputs - Y) ** 2), outputs


def assert_as_by_hand(values):
    for ours, expected in zip(values, by_hand(), strict=True):
        ours = np.reshape(ours, np.shape(expected))
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "kind",
    mostly_slow(
        KINDS, always=["list", "PyDataset", "pandas", "torch", "grain"]
    ),
)
def test_every_kind_of_data_trains_evaluates_and_predicts(kind):
    assert_as_by_hand(trained(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", mostly_slow(KINDS, always=["dict"]))
def test_and_on_replicas(kind, mirrored):
    assert_as_by_hand(trained(kind, mirrored(2)))


def test_replicas_share_sparse_rows_and_batches_they_do_not_divide(mirrored):
    x = A * (A > 0)
    weights = np.ones((2, 1))
    for begin in (0, 7, 14):
        rows = x[begin : begin + 7].astype("float64")
        error = rows @ weights - Y[begin : begin + 7]
        weights = weights - 0.1 * 2 * rows.T @ error / 7
    rows = tf.sparse.from_dense(x)
    dataset = tf.data.Dataset.from_tensor_slices((rows, Y))
    with mirrored(2).scope():
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = keras.Sequential([keras.Input((2,)), layer])
        model.compile(keras.optimizers.SGD(0.1), "mse")
    tfamp.fit(model, dataset.batch(7, drop_remainder=True), verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], weights, rtol=2e-5)
    outputs = tfamp.predict(model, dataset.batch(5))
    np.testing.assert_allclose(outputs, x @ weights, rtol=2e-5, atol=2e-6)
    loss = tfamp.evaluate(model, dataset.batch(5))["loss"]
    np.testing.assert_allclose(loss, np.mean((x @ weights - Y) ** 2), rtol=2e-5)
