"""Every dtype over every collective, dense and sparse, alone and mixed."""

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import mostly_long
from tests.distribute import reduction_cases as cases
from tfamp.distribute import reduction


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


def test_any_number_of_rows_is_summed_in_float32(mirrored):
    strategy = mirrored(2)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)])
    def run(indices):
        def on_replica():
            values = tf.ones([tf.size(indices), 1], tf.bfloat16)
            rows = tf.IndexedSlices(values, indices, tf.constant([3, 1]))
            return reduction.sum_over_replicas([rows])[0]

        return strategy.run(on_replica)

    # bfloat16 would stall at 256 on either replica.
    for total in strategy.experimental_local_results(run([2] * 300)):
        assert total.dtype == tf.bfloat16
        np.testing.assert_array_equal(
            tf.cast(total, "float32"), [[0], [0], [600]]
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
