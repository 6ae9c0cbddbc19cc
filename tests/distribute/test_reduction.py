"""Every dtype over every collective, dense and sparse, alone and mixed."""

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import mostly_long
from tests.distribute import reduction_cases as cases
from tfamp.distribute import reduction, table_rows


# Two replicas have TensorFlow's own collectives, four reduce to one device.
@pytest.mark.slow
@pytest.mark.parametrize("replicas", mostly_long([1, 2, 4], always=[2]))
def test_each_mix_of_dtypes_arrives(replicas, mirrored):
    results = cases.crossed(mirrored(replicas))

    cases.check(results, replicas, local=replicas)


def test_what_is_compared_can_differ(mirrored):
    results = cases.crossed(mirrored(1))
    at = "broadcast/all/2/0"
    results[at] = results[at] ^ np.uint8(1)

    with pytest.raises(AssertionError):
        cases.check(results, 1, local=1)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        # 256 + 1 + 1 + 1 = 259, halfway between 258 and 260.
        (None, 260.0),
        # 256 + 1 is halfway to 258, and goes back to 256 each time.
        ("bfloat16", 256.0),
    ],
)
def test_sums_are_made_in_16_bits_only_where_that_is_asked_for(
    dtype, expected, mirrored
):
    strategy = mirrored(4)

    @tf.function
    def run():
        def on_replica():
            replica = tf.distribute.get_replica_context()
            is_first = replica.replica_id_in_sync_group == 0
            mine = tf.cast(tf.where(is_first, 256.0, 1.0), tf.bfloat16)
            return reduction.sum_over_replicas([mine], dtype)[0]

        return strategy.run(on_replica)

    for total in strategy.experimental_local_results(run()):
        assert total.dtype == tf.bfloat16
        assert float(total) == expected


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32"])
def test_rows_of_any_number_are_those_of_all_replicas(
    dtype, replicas, is_small, mirrored, monkeypatch
):
    monkeypatch.setattr(table_rows, "_SMALL", 28 if is_small else 0)
    # A piece has 5 rows of the one, and 3 of the other.
    monkeypatch.setattr(table_rows, "_ROWS", 5)
    monkeypatch.setattr(table_rows, "_NUMBERS", 3 * 7)
    strategy = mirrored(replicas)

    def of_replica(i, step, width):
        count = (3 * i + 4 * step) % 11
        indices = tf.range(count) * (i + 1) % 4
        values = tf.range(count * width) % 100 + step
        return tf.IndexedSlices(
            tf.reshape(tf.cast(values, dtype), [-1, width]),
            indices,
            tf.constant([4, width]),
        )

    def add_up(slices):
        return tf.math.unsorted_segment_sum(slices.values, slices.indices, 4)

    def on_replica(step):
        replica = tf.distribute.get_replica_context()
        i = replica.replica_id_in_sync_group
        totals = reduction.sum_over_replicas(
            [of_replica(i, step, width) for width in (2, 7)]
        )
        return [part for e in totals for part in (add_up(e), e.indices)]

    @tf.function
    def run(steps):
        for step in tf.range(steps):
            results = strategy.run(on_replica, args=(step,))
            for result in zip(
                *map(strategy.experimental_local_results, results), strict=True
            ):
                tf.numpy_function(note, [step, *result], [])

    found = []

    def note(*values):
        found.append(values)

    run(6)

    assert len(found) == 6 * replicas
    for step, *parts in found:
        for width, total, indices in zip(
            (2, 7), parts[::2], parts[1::2], strict=True
        ):
            slices = [of_replica(i, step, width) for i in range(replicas)]
            np.testing.assert_array_equal(total, sum(map(add_up, slices)))
            wanted = np.concatenate([e.indices for e in slices])
            np.testing.assert_array_equal(
                np.sort(indices),
                np.unique(wanted) if is_small else np.sort(wanted),
            )


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
@pytest.mark.parametrize(
    "dtype", ["int8", "bool", "bfloat16", "float32", "int64", "uint16"]
)
def test_bits_come_back_from_words(dtype, count):
    value = (np.arange(count) % 2).astype(cases.numpy_dtype(dtype))

    words = reduction.to_words(tf.constant(value))
    back = reduction.from_words(words, count, tf.as_dtype(dtype))

    assert words.dtype == tf.int64
    assert len(words) == -(-count * value.dtype.itemsize // 8)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, value)
