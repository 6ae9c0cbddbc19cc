"""Rows of tables between replicas, where no graph knows how many there are.

TensorFlow's collectives take tensors of one shape only in all steps of a loop.
Where rows may differ in number from step to step, a small table crosses whole,
with a count of its rows; those of a large one cross in pieces of one size, as
many as the replica with the most of them needs.
"""

import math
from collections.abc import Sequence

import tensorflow as tf

# A small table has no more numbers.
_SMALL = 2**16
# Nor has a piece more than these: what it lacks is filled up, and crosses too.
_ROWS = 4096
_NUMBERS = 2**20
_NO_ROW = -1


def are_of_any_number(value: tf.Tensor | tf.IndexedSlices) -> bool:
    """Whether a value is rows of a table, and no graph knows how many."""
    return (
        isinstance(value, tf.IndexedSlices)
        and value.indices.shape.num_elements() is None
        and value.values.shape[1:].is_fully_defined()
        and value.dense_shape is not None
    )


def are_of_small_table(slices: tf.IndexedSlices) -> bool:
    """Whether the table is known to have few numbers."""
    shape = tf.get_static_value(slices.dense_shape)
    return shape is not None and math.prod(shape) <= _SMALL


def add_up(slices: tf.IndexedSlices) -> tf.Tensor:
    """The table of which slices are rows."""
    return tf.math.unsorted_segment_sum(
        slices.values, slices.indices, slices.dense_shape[0]
    )


def to_table(slices: tf.IndexedSlices) -> tf.Tensor:
    """Adds up rows, and counts them: [rows of the table, 1 + their numbers]."""
    values = slices.values
    flat = tf.reshape(values, [-1, math.prod(values.shape[1:])])
    ones = tf.ones([tf.size(slices.indices), 1], values.dtype)
    return add_up(
        tf.IndexedSlices(
            tf.concat([ones, flat], 1), slices.indices, slices.dense_shape
        )
    )


def from_table(table: tf.Tensor, slices: tf.IndexedSlices) -> tf.IndexedSlices:
    """Those rows of a sum of tables that were counted.

    Args:
        table: the sum of `to_table` of each replica.
        slices: what this replica made its own of.
    """
    indices = tf.where(table[:, 0] != 0)[:, 0]
    values = tf.reshape(
        tf.gather(table[:, 1:], indices), [-1, *slices.values.shape[1:]]
    )
    indices = tf.cast(indices, slices.indices.dtype)
    return tf.IndexedSlices(values, indices, slices.dense_shape)


def count_pieces(gathered: Sequence[tf.IndexedSlices]) -> tf.Tensor:
    """In how many pieces the rows of this replica cross: an int32 scalar."""
    counts = [
        -(-tf.size(slices.indices) // _rows_of_piece(slices.values))
        for slices in gathered
    ]
    return tf.reduce_max(counts)


def gather(
    gathered: Sequence[tf.IndexedSlices], pieces: tf.Tensor
) -> list[tf.IndexedSlices]:
    """The rows of all replicas, on each of them; in replica context.

    Args:
        gathered: of dtypes that collectives know.
        pieces: the greatest `count_pieces` of all replicas.
    """
    replica = tf.distribute.get_replica_context()
    found = replica.merge_call(
        _gather_by_pieces, args=([_pair(slices) for slices in gathered], pieces)
    )
    return [
        tf.IndexedSlices(values, indices, slices.dense_shape)
        for (values, indices), slices in zip(found, gathered, strict=True)
    ]


def _gather_by_pieces(strategy, pairs, pieces):
    # A loop around collectives stands outside of replicas.
    count = strategy.experimental_local_results(pieces)[0]

    def gather_piece(i, found):
        return i + 1, strategy.run(_add_piece, args=(i, pairs, found))

    none = strategy.run(_no_rows, args=(pairs,))
    _, found = tf.while_loop(
        lambda i, _: i < count, gather_piece, (tf.constant(0), none)
    )
    return found


def _add_piece(i, pairs, found):
    """What was found so far, and the i-th piece of each replica."""
    replica = tf.distribute.get_replica_context()
    of_all = replica.all_reduce(
        tf.distribute.ReduceOp.SUM,
        [tf.IndexedSlices(*_piece(i, *pair)) for pair in pairs],
    )
    return [
        [
            tf.concat([so_far, tf.boolean_mask(more, slices.indices >= 0)], 0)
            for so_far, more in zip(pair, _pair(slices), strict=True)
        ]
        for pair, slices in zip(found, of_all, strict=True)
    ]


def _piece(i, values, indices):
    count = _rows_of_piece(values)
    values = values[i * count : (i + 1) * count]
    indices = indices[i * count : (i + 1) * count]
    missing = [[0, count - tf.size(indices)]]
    others = [[0, 0]] * (values.shape.rank - 1)
    return (
        tf.ensure_shape(
            tf.pad(values, missing + others), [count, *values.shape[1:]]
        ),
        tf.ensure_shape(
            tf.pad(indices, missing, constant_values=_NO_ROW), [count]
        ),
    )


def _rows_of_piece(values: tf.Tensor) -> int:
    numbers = max(1, math.prod(values.shape[1:]))
    return max(1, min(_ROWS, _NUMBERS // numbers))


def _no_rows(pairs):
    return [[values[:0], indices[:0]] for values, indices in pairs]


def _pair(slices: tf.IndexedSlices) -> list[tf.Tensor]:
    return [slices.values, slices.indices]
