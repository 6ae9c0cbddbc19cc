"""Names of strategies, and each replica's share of the data."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import mostly_long
from tfamp.distribute import strategy as strategy_lib


def test_auto_and_one_device_are_the_default_strategy_on_one_cpu():
    for name in ("auto", "one_device"):
        assert tfamp.get_strategy(name) is tf.distribute.get_strategy()


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_mirrored_takes_that_many_logical_devices(num_devices):
    strategy = tfamp.get_strategy("mirrored", num_devices=num_devices)
    assert strategy.num_replicas_in_sync == num_devices
    assert len(strategy_lib.devices_of(strategy)) == num_devices


def test_auto_is_mirrored_where_several_devices_are_asked_for():
    strategy = tfamp.get_strategy("auto", num_devices=2)
    assert isinstance(strategy, tf.distribute.MirroredStrategy)


@pytest.mark.parametrize(
    ("name", "num_devices", "message"),
    [
        ("ddp", None, "Unknown strategy 'ddp'; expected one of auto, one_dev"),
        ("parameter_server", None, "does not support parameter servers"),
        ("one_device", 2, "contradicts strategy 'one_device'"),
        ("mirrored", 0, "must be at least 1"),
        ("mirrored", 64, "has started with 4 CPU device"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(name, num_devices, message):
    tf.constant(0)
    with pytest.raises(tfamp.InputError, match=message):
        tfamp.get_strategy(name, num_devices=num_devices)


def shares(strategy, dataset):
    """Per replica: the rows that count, of all batches; and batch sizes."""

    @tf.function
    def counted(iterator):
        return strategy.run(
            lambda share: (share.data[: share.rows], share.batch_rows),
            args=(next(iterator),),
        )

    rows = [[] for _ in range(strategy.num_replicas_in_sync)]
    sizes = []
    iterator = iter(strategy_lib.distribute_batches(strategy, dataset))
    while True:
        try:
            data, batch_rows = counted(iterator)
        except tf.errors.OutOfRangeError:
            return rows, sizes
        for replica, value in enumerate(
            strategy.experimental_local_results(data)
        ):
            rows[replica].append(value.numpy().tolist())
        sizes.append(int(strategy.experimental_local_results(batch_rows)[0]))


@pytest.mark.parametrize(
    ("rows", "batch_size"),
    mostly_long(
        itertools.product((1, 3, 8, 11), (1, 4, 5)),
        always=[(1, 4), (8, 4), (11, 5), (3, 1)],
    ),
)
def test_every_row_is_one_replicas_and_counts_once(strategy, rows, batch_size):
    dataset = tf.data.Dataset.range(rows).batch(batch_size)
    pieces, sizes = shares(strategy, dataset)
    in_order = [
        row for batch in zip(*pieces, strict=True) for p in batch for row in p
    ]
    assert in_order == list(range(rows))
    assert sizes == [len(batch) for batch in dataset]
    for batch in zip(*pieces, strict=True):
        lengths = [len(piece) for piece in batch]
        assert max(lengths) - min(lengths) <= 1


def test_batches_of_a_known_size_need_no_replica_to_be_like_another(mirrored):
    dataset = tf.data.Dataset.range(6).batch(3, drop_remainder=True)
    pieces, sizes = shares(mirrored(2), dataset)
    assert pieces == [[[0], [3]], [[1, 2], [4, 5]]]
    assert sizes == [3, 3]


def test_a_replica_without_rows_gets_one_that_does_not_count():
    (first,) = tf.data.Dataset.range(1).batch(4)
    data, rows = strategy_lib.split_evenly(first, 0, 4)
    assert (data.shape[0], int(rows)) == (1, 0)


def test_static_batch_sizes_stay_static_in_every_piece():
    data, rows = strategy_lib.split_evenly(tf.zeros([8, 3]), tf.constant(1), 4)
    assert data.shape == (2, 3)
    assert int(rows) == 2


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Another device of this host, in the place of a GPU."""
    device = "/device:CPU:1"
    monkeypatch.setattr(strategy_lib, "computes_on_gpus", lambda _: True)
    monkeypatch.setattr(strategy_lib, "devices_of", lambda _: [device])


def test_the_next_batch_is_on_the_device_before_it_is_wanted(as_on_a_gpu):
    strategy = tf.distribute.get_strategy()
    x = np.arange(10, dtype="float32")
    data = tf.data.Dataset.from_tensor_slices((x, x.astype("int32"), x > 4))
    found = list(strategy_lib.distribute_batches(strategy, data.batch(4)))

    assert [int(share.rows) for share in found] == [4, 4, 2]
    for share in found:
        for tensor in tf.nest.flatten(share):
            assert tensor.device.endswith("CPU:1")
    for i in range(3):
        together = np.concatenate([share.data[i] for share in found])
        np.testing.assert_array_equal(together, [x, x, x > 4][i])


def test_what_is_no_plain_array_stays_on_the_host(as_on_a_gpu):
    strategy = tf.distribute.get_strategy()
    for element in (tf.constant(["a", "b"]), tf.ragged.constant([[1], []])):
        data = tf.data.Dataset.from_tensors({"x": element})
        (share,) = strategy_lib.distribute_batches(strategy, data)
        assert int(share.rows) == 2


def test_training_from_the_device_is_training_from_the_host(monkeypatch):
    def trained():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        x = np.random.default_rng(0).normal(size=(10, 3)).astype("float32")
        data = tf.data.Dataset.from_tensor_slices((x, x[:, :1]))
        # Of unknown length, with a partial last batch.
        data = data.batch(4).filter(lambda x, y: True)
        tfamp.fit(model, data, epochs=2, verbose=0)
        results = tfamp.evaluate(model, data)
        return [*model.get_weights(), results["loss"]]

    expected = trained()
    monkeypatch.setattr(strategy_lib, "computes_on_gpus", lambda _: True)
    monkeypatch.setattr(strategy_lib, "devices_of", lambda _: ["/CPU:1"])
    for one, other in zip(trained(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_structure_is_split_alike(mirrored):
    batch = (
        {"a": tf.range(5), "r": tf.ragged.range(tf.range(5))},
        tf.range(10, 15),
        None,
    )
    (x, y, nothing), rows = strategy_lib.split_evenly(batch, 1, 2)
    assert int(rows) == 3
    np.testing.assert_array_equal(x["a"], [2, 3, 4])
    assert x["r"].to_list() == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    np.testing.assert_array_equal(y, [12, 13, 14])
    assert nothing is None


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (lambda: tf.data.Dataset.range(9), "yields single examples; batch it"),
        (
            lambda: tf.data.Dataset.from_tensors(
                (tf.zeros([2, 2]), tf.zeros([]))
            ),
            "yields single examples; batch it",
        ),
        (
            lambda: tf.data.Dataset.range(4).batch(2).map(lambda x: (x, None)),
            "yields a None, which TensorFlow cannot give to 2 replicas",
        ),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(mirrored, dataset, message):
    with pytest.raises(tfamp.InputError, match=message):
        strategy_lib.distribute_batches(mirrored(2), dataset())
