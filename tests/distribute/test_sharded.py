"""A worker decodes its rows only, and the numbers are those of one process."""

import collections
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import FLOAT32_ROUNDING, mostly_long
from tfamp.distribute.strategy import distribute_batches

ROWS, BATCH = 20, 8


class Workers:
    """So many workers of one replica, of which each is asked in turn."""

    def __init__(self, count):
        self.num_replicas_in_sync = count

    def distribute_datasets_from_function(self, make):
        count = self.num_replicas_in_sync
        return [
            make(tf.distribute.InputContext(count, worker, count))
            for worker in range(count)
        ]


Pair = collections.namedtuple("Pair", ["square", "label"])
LENGTHS = tf.data.Dataset.range(ROWS).map(lambda i: (tf.range(i), i))
# Records and how they are decoded; each example tells which row it is of.
KINDS = {
    "number": (tf.data.Dataset.range(ROWS), lambda i: i * i),
    "tuple": (
        tf.data.Dataset.zip(
            tf.data.Dataset.range(ROWS), tf.data.Dataset.range(ROWS)
        ),
        lambda i, j: (tf.fill([3], i), j + 1),
    ),
    "tuple_of_one": (
        tf.data.Dataset.zip((tf.data.Dataset.range(ROWS),)),
        lambda i: (i + 1,),
    ),
    "dict": (
        tf.data.Dataset.range(ROWS).map(
            lambda i: {"a": tf.strings.as_string(i)}
        ),
        lambda record: (
            {"x": tf.strings.to_number(record["a"])},
            tf.strings.length(record["a"]),
        ),
    ),
    "list": (tf.data.Dataset.range(ROWS), lambda i: [i, i + 1]),
    "named": (tf.data.Dataset.range(ROWS), lambda i: Pair(i * i, i)),
    # Arrays of other lengths, bfloat16 among them.
    "lengths": (
        LENGTHS.map(lambda x, i: (tf.cast(x, tf.bfloat16), i)),
        lambda x, i: (tf.reduce_sum(tf.cast(x, tf.float32)), i),
    ),
    "ragged": (
        LENGTHS.map(lambda x, i: tf.RaggedTensor.from_row_lengths(x, [i, 0])),
        lambda rows: tf.reduce_sum(rows.values),
    ),
}


@pytest.mark.parametrize(
    ("kind", "drop"),
    mostly_long(
        itertools.product(KINDS, (True, False)),
        always=[("tuple_of_one", True), ("lengths", False)],
    ),
)
def test_workers_together_have_the_rows_of_one_process(kind, drop):
    records, decode = KINDS[kind]
    plain = records.map(decode).batch(BATCH, drop_remainder=drop)

    data = tfamp.sharded(records, decode, BATCH, drop_remainder=drop)

    assert data.element_spec == plain.element_spec
    assert data.cardinality() == plain.cardinality()
    tf.nest.map_structure(
        np.testing.assert_array_equal, list(data), list(plain)
    )
    shares = [list(worker) for worker in distribute_batches(Workers(4), data)]
    as_ever = [list(worker) for worker in distribute_batches(Workers(4), plain)]
    # 20 rows are two batches of 8, and one of 4.
    assert [len(worker) for worker in shares] == [2 if drop else 3] * 4
    tf.nest.map_structure(np.testing.assert_array_equal, shares, as_ever)


def test_what_follows_batches_keeps_them_sharded():
    records, decode = KINDS["tuple"]

    def changed(data):
        data = data.with_options(tf.data.Options()).prefetch(2)
        return data.skip(1).repeat(3).take(4)

    data = changed(tfamp.sharded(records, decode, BATCH))
    plain = changed(records.map(decode).batch(BATCH))

    assert isinstance(data, type(tfamp.sharded(records, decode, BATCH)))
    tf.nest.map_structure(
        np.testing.assert_array_equal, list(data), list(plain)
    )
    (worker, _), (as_ever, _) = (
        distribute_batches(Workers(2), each) for each in (data, plain)
    )
    tf.nest.map_structure(
        np.testing.assert_array_equal, list(worker), list(as_ever)
    )


@pytest.mark.parametrize(
    ("workers", "decoded"),
    mostly_long([(1, 16), (2, 8), (4, 4), (8, 2)], always=[(4, 4)]),
)
def test_a_worker_decodes_no_row_of_another(workers, decoded):
    calls = []

    def decode(i):
        number = tf.numpy_function(
            lambda i: calls.append(int(i)) or i, [i], tf.int64
        )
        number.set_shape([])
        return number

    records = tf.data.Dataset.range(16)
    data = tfamp.sharded(records, decode, 8, drop_remainder=True)
    last = distribute_batches(Workers(workers), data)[-1]

    kept = [int(row) for share in last for row in share.data]

    assert sorted(calls) == kept
    assert len(kept) == decoded


@pytest.mark.slow
@pytest.mark.parametrize("replicas", mostly_long((2, 4), always=[2]))
def test_fit_and_evaluate_have_the_numbers_of_one_process(replicas, mirrored):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((22, 5)).astype("float32")
    y = generator.integers(0, 3, 22)

    def trained(strategy):
        keras.utils.set_random_seed(0)
        records = tf.data.Dataset.from_tensor_slices((x, y))
        records = records.shuffle(22, seed=1)
        with strategy.scope():
            model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
            model.compile(
                keras.optimizers.SGD(0.1),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
        data = tfamp.sharded(
            records,
            lambda x, y: (x * 2.0, y),
            BATCH,
            finish=lambda x, y: (x + tf.reduce_mean(x, 1, keepdims=True), y),
        )
        tfamp.fit(model, data, epochs=2, verbose=0)
        return [*model.get_weights(), tfamp.evaluate(model, data)["loss"]]

    one = trained(tf.distribute.get_strategy())
    many = trained(mirrored(replicas))

    for mine, expected in zip(many, one, strict=True):
        np.testing.assert_allclose(mine, expected, **FLOAT32_ROUNDING)


DRAWS = {
    "uniform": lambda generator, i: tf.random.uniform([]),
    "generator": lambda generator, i: generator.normal([]),
    "branch": lambda generator, i: tf.cond(
        i > 2, lambda: tf.random.normal([]), lambda: 0.0
    ),
    "shuffle": lambda generator, i: tf.random.shuffle([i, i]),
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("where", ["decode", "finish"])
def test_draws_of_a_process_are_refused(kind, where):
    generator = tf.random.Generator.from_seed(1)

    def draw(i):
        return DRAWS[kind](generator, i)

    if where == "finish":
        arguments = {
            "decode": lambda i: i,
            "finish": lambda i: draw(i[0]),
        }
    else:
        arguments = {"decode": draw}

    with pytest.raises(tfamp.InputError, match=f"{where} draws by .*stateless"):
        tfamp.sharded(tf.data.Dataset.range(8), batch_size=4, **arguments)


def test_draws_of_the_record_are_not():
    data = tfamp.sharded(
        tf.data.Dataset.range(8),
        lambda i: tf.random.stateless_uniform([], tf.stack([i, i])),
        4,
    )
    first, second = (
        np.concatenate([share.data for share in worker])
        for worker in distribute_batches(Workers(2), data)
    )
    whole = np.concatenate(list(data)).reshape([2, 2, 2])

    np.testing.assert_array_equal(first, whole[:, 0].ravel())
    np.testing.assert_array_equal(second, whole[:, 1].ravel())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"records": [1, 2]}, "records is a list"),
        ({"batch_size": 0}, "batch_size=0 must"),
        ({"batch_size": True}, "batch_size=True must"),
        ({"batch_size": 2.0}, "batch_size=2.0 must"),
        (
            {"drop_remainder": True, "finish": lambda i: i[:1]},
            "finish makes 1 rows of 4",
        ),
    ],
)
def test_other_arguments_are_refused(changes, line):
    arguments = {
        "records": tf.data.Dataset.range(8),
        "decode": lambda i: i,
        "batch_size": 4,
    }
    with pytest.raises(tfamp.InputError, match=line):
        tfamp.sharded(**arguments | changes)
