"""Gradients across replicas: sums, verdicts, and what stays sparse."""

import numpy as np
import pytest
import tensorflow as tf

from tfamp.scaling import gradients


def slices(values, indices, rows=4):
    values = tf.constant(values, tf.float32)
    return tf.IndexedSlices(
        values, tf.constant(indices), tf.constant([rows, values.shape[1]])
    )


def is_finite(values):
    finite, _ = gradients.unscale(values, [False] * len(values))
    return finite


def on_each_replica(strategy, function):
    """What `function(replica)` returns on each replica, traced."""

    @tf.function
    def run():
        return strategy.run(
            lambda: function(
                tf.distribute.get_replica_context().replica_id_in_sync_group
            )
        )

    return tf.nest.map_structure(strategy.experimental_local_results, run())


def test_sums_are_those_of_all_replicas_on_every_replica(strategy):
    replicas = strategy.num_replicas_in_sync

    def reduce(replica):
        mine = tf.cast(replica + 1, tf.float32)
        (total, none) = gradients.all_reduce(
            [tf.stack([mine, 2 * mine]), None], [False, False]
        )
        assert none is None
        return total

    for total in on_each_replica(strategy, reduce):
        expected = replicas * (replicas + 1) / 2
        np.testing.assert_array_equal(total, [expected, 2 * expected])


def test_next_values_agree_by_maximum_elementwise(strategy):
    replicas = strategy.num_replicas_in_sync

    def reduce(replica):
        mine = tf.cast(replica, tf.float32)
        next_values = [tf.stack([mine, -mine]), tf.reshape(mine, (1, 1))]
        return gradients.all_reduce(next_values, [True, True])

    first, second = on_each_replica(strategy, reduce)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, [replicas - 1, 0])
        np.testing.assert_array_equal(b, [[replicas - 1]])


def test_sparse_gradients_stay_sparse_and_sum_over_replicas(mirrored):
    def reduce(replica):
        # Replica 0 names rows 1, 3, 1; replica 1 names rows 2, 3, 2.
        both = slices([[1.0], [2.0], [4.0]], [1, 3, 1])
        mine = tf.IndexedSlices(
            both.values,
            both.indices + tf.cast(tf.stack([replica, 0, replica]), tf.int32),
            both.dense_shape,
        )
        (reduced,) = gradients.all_reduce([mine], [False])
        assert isinstance(reduced, tf.IndexedSlices)
        return reduced.values, reduced.indices, tf.convert_to_tensor(reduced)

    values, indices, dense = on_each_replica(mirrored(2), reduce)
    for replica in range(2):
        np.testing.assert_array_equal(dense[replica], [[0], [5], [5], [4]])
        assert values[replica].shape == (6, 1)
        assert set(indices[replica].numpy()) == {1, 2, 3}
        # A norm of the values is a norm of the gradient.
        assert float(tf.norm(values[replica])) == pytest.approx(66**0.5)


@pytest.mark.parametrize("traced", [False, True])
def test_rows_of_one_index_are_summed_once(traced):
    def reduce():
        gradient = slices([[1.0], [2.0], [4.0], [8.0]], [3, 0, 3, 3])
        return gradients.all_reduce([gradient], [False])[0]

    reduced = (tf.function(reduce) if traced else reduce)()
    by_index = sorted(
        zip(reduced.indices.numpy(), reduced.values.numpy()[:, 0], strict=True)
    )
    # Left-over rows hold zeros at an index that is there already.
    assert by_index == [(0, 2.0), (3, 0.0), (3, 0.0), (3, 13.0)]


def test_a_sparse_gradient_of_no_rows_is_reduced_too():
    empty = tf.IndexedSlices(
        tf.zeros([0, 2]), tf.zeros([0], tf.int32), tf.constant([4, 2])
    )
    (reduced,) = gradients.all_reduce([empty], [False])
    np.testing.assert_array_equal(
        tf.convert_to_tensor(reduced), np.zeros((4, 2))
    )
    assert bool(is_finite([reduced]))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_bad_value_anywhere_is_found(bad):
    clean = tf.constant([1.0, 65504.0, -0.0, 1e-45])
    assert bool(is_finite([clean, None]))
    assert not bool(is_finite([clean, tf.constant([0.0, bad])]))
    assert not bool(is_finite([slices([[bad]], [2]), clean]))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_one_bad_value_among_a_million_is_found(bad):
    large = tf.fill([2**20], 1e15)
    assert bool(is_finite([large]))
    last = tf.constant([bad])
    assert not bool(is_finite([large, last]))
    assert not bool(is_finite([tf.concat([tf.zeros([2**20]), last], 0)]))


def test_a_gradient_whose_square_overflows_counts_as_infinite():
    assert bool(is_finite([tf.constant([1.8e19])]))
    assert not bool(is_finite([tf.constant([1.9e19])]))
    # Each square is finite, and their sum is not.
    assert not bool(is_finite([tf.fill([4], 1e19)]))
    # It is the true gradient's, too: 2.0**62 times 16 is beyond 1.8e19.
    scaled = [tf.constant([2.0**62])]
    for scale, expected in ((1.0, True), (2.0**-4, False)):
        finite, _ = gradients.unscale(scaled, [False], tf.constant(scale))
        assert bool(finite) is expected


def test_no_gradients_are_finite():
    assert bool(is_finite([]))
    assert bool(is_finite([None]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_gradients_are_multiplied_in_float32(dtype):
    small = tf.constant([2.0**-14], dtype)
    product = gradients.multiply(small, tf.constant(2.0**-16))
    assert product.dtype == tf.float32
    assert float(product[0]) == 2.0**-30
    sparse = gradients.multiply(
        tf.IndexedSlices(small, tf.constant([1]), tf.constant([2])),
        tf.constant(2.0**-16),
    )
    assert isinstance(sparse, tf.IndexedSlices)
    assert float(sparse.values[0]) == 2.0**-30


def test_float64_gradients_keep_their_bits():
    third = tf.constant([1 / 3], tf.float64)
    product = gradients.multiply(third, tf.constant(0.5))
    assert product.dtype == tf.float64
    assert float(product[0]) == 1 / 6


def test_the_wire_may_be_narrow_and_the_sums_come_back_wide(mirrored):
    def reduce(replica):
        # Spacing of bfloat16 at 1 is 2^-7.
        (total,) = gradients.all_reduce(
            [tf.constant([1.0 + 2.0**-9])], [False], "bfloat16"
        )
        assert total.dtype == tf.float32
        return total

    for total in on_each_replica(mirrored(2), reduce):
        np.testing.assert_array_equal(total, [2.0])


def test_unscaling_and_clipping_are_by_the_global_norm():
    # 6, 8 and 0: of norm 10, at a scale of 4.
    scaled = [tf.constant([24.0, 0.0]), None, slices([[32.0]], [2])]
    finite, (dense, none, sparse) = gradients.unscale(
        scaled, [False] * 3, tf.constant(4.0), clip_norm=5.0
    )
    assert bool(finite)
    assert none is None
    np.testing.assert_array_equal(dense, [3.0, 0.0])
    np.testing.assert_array_equal(sparse.values, [[4.0]])


def test_next_values_are_judged_but_neither_scaled_nor_clipped():
    values = [tf.constant([24.0]), tf.constant([64.0])]
    finite, (gradient, next_value) = gradients.unscale(
        values, [False, True], tf.constant(4.0), clip_norm=3.0
    )
    assert bool(finite)
    assert float(gradient[0]) == 3.0
    assert float(next_value[0]) == 64.0
    values[1] = tf.constant([np.nan])
    finite, _ = gradients.unscale(values, [False, True], tf.constant(4.0))
    assert not bool(finite)
