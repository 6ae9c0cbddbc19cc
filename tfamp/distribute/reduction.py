"""What crosses between replicas: sums, rows of all, the first one's, maxima.

TensorFlow's collectives each know other dtypes (a broadcast and a gather know
neither bfloat16 nor int8), and take tensors of one dtype at a time. Here any
list of tensors crosses, of any dtypes, by few collectives: numbers are summed
by dtype, and what must arrive bit by bit travels as integers of 64 bits, which
every collective adds, and to which all replicas but one give zeros.

All functions but `gather_rows` run in replica context, of any strategy; of one
replica, or of none, they give back what they got.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from tfamp.distribute import table_rows
from tfamp.tensorflow_internals import is_compiled_by_xla

Value: TypeAlias = tf.Tensor | tf.IndexedSlices
_Crossing: TypeAlias = tuple[
    Callable[[list[Any]], Sequence[Any]], tf.DType | None
]

# What tf.raw_ops.CollectiveGatherV2 takes, but for int32: MirroredStrategy
# takes only one int32 tensor at a time, and on the host.
_GATHERED = (tf.float32, tf.float16, tf.float64, tf.int64)
_WORD = tf.int64


def sum_over_replicas(
    values: Sequence[Value], dtype: str | None = None
) -> list[Value]:
    """The sum over replicas of each value, the same on all of them.

    Args:
        values: dense tensors, of any shapes and dtypes, and
            `tf.IndexedSlices`, of as many rows as each replica has. Only their
            number and dtypes must be the same on all replicas.
        dtype: in which floating-point numbers cross and are added; None for
            their own, or float32 where that is one of 16 bits.

    Returns:
        The sums, in the values' own dtypes. A sum of booleans tells whether
        any is true; one of integers wraps around. Rows of `tf.IndexedSlices`
        are those of all replicas, in no order: they are added up by who uses
        them, in what dtype they like. Where XLA compiles, which knows no rows
        of any number, the sum of such is dense.
    """
    if not values or _replicas() == 1:
        return list(values)
    sent = [_to_sum(value, dtype) for value in values]
    groups: dict[_Crossing, list[int]] = {}
    for i, value in enumerate(sent):
        groups.setdefault(_crossing(value), []).append(i)
    reduced = list(values)
    for (cross, _), positions in groups.items():
        sums = cross([sent[i] for i in positions])
        for i, total in zip(positions, sums, strict=True):
            reduced[i] = total
    return [
        _as_summed(total, value, dtype)
        for total, value in zip(reduced, values, strict=True)
    ]


def gather(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Of each value, a row for each replica, bit by bit: [replicas, ...].

    Args:
        values: of any shapes and dtypes, the same ones on all replicas.
    """
    if not values:
        return []
    count = _replicas()
    if count == 1:
        return [value[tf.newaxis] for value in values]
    words = _pack(values)[tf.newaxis]
    is_mine = tf.range(count)[:, tf.newaxis] == _replica_id()
    rows = _add_words(tf.where(is_mine, words, tf.zeros_like(words)))
    return _unpack(rows, values)


def broadcast(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The first replica's values, bit by bit, on all replicas.

    Args:
        values: of any shapes and dtypes, the same ones on all replicas.
    """
    if not values or _replicas() == 1:
        return list(values)
    words = _pack(values)[tf.newaxis]
    rows = _add_words(tf.where(_replica_id() == 0, words, tf.zeros_like(words)))
    return [row[0] for row in _unpack(rows, values)]


def maximum(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The elementwise maximum over replicas of each value.

    Args:
        values: of any shapes and dtypes, the same ones on all replicas.
    """
    if _replicas() == 1:
        return list(values)
    return [
        tf.cast(tf.reduce_max(_comparable(rows), axis=0), rows.dtype)
        for rows in gather(values)
    ]


def gather_rows(strategy: tf.distribute.Strategy, values: Any) -> tf.Tensor:
    """The rows of all replicas, on every worker, outside of replica context.

    Args:
        strategy: of the replicas.
        values: what they returned, numbers of any one dtype, whose first
            dimensions may differ.
    """
    dtype = strategy.experimental_local_results(values)[0].dtype
    sent = strategy.run(lambda rows: _to_gather(rows, None), args=(values,))
    return _from_wire(strategy.gather(sent, axis=0), dtype, None)


def mean(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The mean over replicas of each value, computed in float32 or better.

    It is taken around the first replica's: values that agree stay
    bit-identical.

    Args:
        values: floating-point, of any shapes, the same ones on all replicas.
    """
    count = _replicas()
    if count == 1:
        return list(values)
    firsts = broadcast(values)
    # inf - inf is no number, though the two agree.
    offsets = sum_over_replicas(
        [
            tf.where(value == first, tf.zeros_like(offset), offset)
            for value, first, offset in (
                (value, first, _wide(value) - _wide(first))
                for value, first in zip(values, firsts, strict=True)
            )
        ]
    )
    return [
        tf.where(
            offset == 0, first, tf.cast(_wide(first) + offset / count, dtype)
        )
        for first, offset, dtype in zip(
            firsts, offsets, [value.dtype for value in values], strict=True
        )
    ]


def map_values(
    function: Callable[[tf.Tensor], tf.Tensor], value: Value
) -> Value:
    """Applies a function to a tensor, or to the rows of `tf.IndexedSlices`."""
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(
            function(value.values), value.indices, value.dense_shape
        )
    return function(value)


def to_words(tensor: tf.Tensor) -> tf.Tensor:
    """The bits of a tensor, as int64 [N]; zeros fill up the last one."""
    flat = tf.reshape(tensor, [-1])
    if flat.dtype == tf.bool:
        # tf.bitcast takes no booleans.
        flat = tf.cast(flat, tf.uint8)
    per_word = _WORD.size // flat.dtype.size
    if per_word == 1:
        return tf.bitcast(flat, _WORD)
    rest = -_count(flat) % per_word
    flat = tf.concat([flat, tf.zeros([rest], flat.dtype)], axis=0)
    return tf.bitcast(tf.reshape(flat, [-1, per_word]), _WORD)


def from_words(words: tf.Tensor, count, dtype: tf.DType) -> tf.Tensor:
    """What `to_words` made words of, of so many numbers: [..., count].

    Args:
        words: int64 [..., N].
        count: an integer, or an integer scalar.
        dtype: of the numbers.
    """
    stored = tf.uint8 if dtype == tf.bool else dtype
    numbers = tf.bitcast(words, stored)
    if stored.size < _WORD.size:
        leading = tf.shape(words)[:-1]
        numbers = tf.reshape(numbers, tf.concat([leading, [-1]], axis=0))
    return tf.cast(numbers[..., :count], dtype)


def _pack(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """All bits of all values: int64 [N]."""
    return tf.concat(
        [
            to_words(tf.concat([tf.reshape(values[i], [-1]) for i in group], 0))
            for group in _by_dtype(values)
        ],
        axis=0,
    )


def _unpack(words: tf.Tensor, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """int64 [R, N] as values like those that were packed: [R, ...] each."""
    unpacked = list(values)
    begin = 0
    for group in _by_dtype(values):
        dtype = values[group[0]].dtype
        counts = [_count(values[i]) for i in group]
        per_word = _WORD.size // dtype.size
        end = begin + -(-sum(counts) // per_word)
        # No tf.split: GPUs split floating-point numbers only.
        numbers = from_words(words[:, begin:end], sum(counts), dtype)
        begin, first = end, 0
        for i, count in zip(group, counts, strict=True):
            part = numbers[:, first : first + count]
            first += count
            unpacked[i] = _reshape(part, values[i])
    return unpacked


def _reshape(part: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    if like.shape.is_fully_defined():
        return tf.reshape(part, [part.shape[0], *like.shape])
    shape = tf.concat([tf.shape(part)[:1], tf.shape(like)], axis=0)
    return tf.reshape(part, shape)


def _by_dtype(values: Sequence[tf.Tensor]) -> list[list[int]]:
    groups: dict[tf.DType, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault(value.dtype, []).append(i)
    return list(groups.values())


def _add_words(words: tf.Tensor) -> tf.Tensor:
    """The sum over replicas, of which one alone gives other than zeros."""
    [total] = _all_reduce([words])
    return total


def _to_sum(value: Value, dtype: str | None) -> Value:
    if table_rows.are_of_any_number(value):
        if is_compiled_by_xla():
            value = table_rows.add_up(_wide_rows(value))
        elif table_rows.are_of_small_table(value):
            value = table_rows.to_table(_wide_rows(value))
    is_sparse = isinstance(value, tf.IndexedSlices)
    convert = _to_gather if is_sparse else _to_add
    return map_values(functools.partial(convert, dtype=dtype), value)


def _as_summed(total: Value, value: Value, dtype: str | None) -> Value:
    """A sum of what `_to_sum` made of values, as these are."""
    total = map_values(
        functools.partial(_from_wire, own=value.dtype, dtype=dtype), total
    )
    is_table = isinstance(total, tf.Tensor) and not is_compiled_by_xla()
    if is_table and table_rows.are_of_any_number(value):
        return table_rows.from_table(total, value)
    return total


def _crossing(value: Value) -> _Crossing:
    """What takes such values over, those of one dtype in one call.

    Within a call TensorFlow packs without looking at dtypes.
    """
    if table_rows.are_of_any_number(value):
        return _gather_in_pieces, None
    is_sparse = isinstance(value, tf.IndexedSlices)
    return _all_reduce, None if is_sparse else value.dtype


def _all_reduce(values: list[Value]) -> list[Value]:
    replica = tf.distribute.get_replica_context()
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, values)


def _gather_in_pieces(
    slices: list[tf.IndexedSlices],
) -> list[tf.IndexedSlices]:
    [pieces] = maximum([table_rows.count_pieces(slices)])
    return table_rows.gather(slices, pieces)


def _to_add(tensor: tf.Tensor, dtype: str | None) -> tf.Tensor:
    if tensor.dtype.is_floating:
        return _wide(tensor) if dtype is None else tf.cast(tensor, dtype)
    # Of the integers, AddN adds int64 on any device.
    is_known = tensor.dtype.is_complex
    return tensor if is_known else tf.cast(tensor, tf.int64)


def _to_gather(tensor: tf.Tensor, dtype: str | None) -> tf.Tensor:
    # Rows are not added on the way: 16 bits lose nothing there.
    if tensor.dtype.is_floating and dtype is not None:
        tensor = tf.cast(tensor, dtype)
    if tensor.dtype == tf.bfloat16:
        return tf.bitcast(tensor, tf.float16)
    is_known = tensor.dtype in _GATHERED or tensor.dtype.is_complex
    return tensor if is_known else tf.cast(tensor, tf.int64)


def _from_wire(
    tensor: tf.Tensor, own: tf.DType, dtype: str | None
) -> tf.Tensor:
    crossed = tf.as_dtype(dtype) if dtype and own.is_floating else own
    if tensor.dtype == tf.float16 and crossed == tf.bfloat16:
        tensor = tf.bitcast(tensor, tf.bfloat16)
    return tf.cast(tensor, own)


def _wide(tensor: tf.Tensor) -> tf.Tensor:
    is_narrow = tensor.dtype.size < tf.float32.size
    return tf.cast(tensor, tf.float32) if is_narrow else tensor


def _wide_rows(slices: tf.IndexedSlices) -> tf.IndexedSlices:
    """Rows that are to be added: 16 bits lose what is small beside the sum."""
    return map_values(_wide, slices) if slices.dtype.is_floating else slices


def _comparable(tensor: tf.Tensor) -> tf.Tensor:
    """In a dtype that any device finds a maximum of; exact."""
    if tensor.dtype.is_floating:
        return _wide(tensor)
    return tf.cast(tensor, tf.int64)


def _count(tensor: tf.Tensor):
    """How many numbers: an int where the shape is known, else int32."""
    if tensor.shape.is_fully_defined():
        return math.prod(tensor.shape)
    return tf.size(tensor)


def _replica_id() -> tf.Tensor:
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def _replicas() -> int:
    return tf.distribute.get_strategy().num_replicas_in_sync
