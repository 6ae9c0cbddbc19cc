"""Data that each worker decodes its own rows of, and no others.

Batches that come decoded are split too late: each worker has read, decoded and
augmented the rows of all. Here the split comes between reading and decoding,
and the numbers stay those of one process, row by row.
"""

import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfamp.errors import InputError

# They draw the next numbers of a sequence of the process. Those named
# Stateless... draw what their seed says.
_DRAWS = re.compile(
    r"Random|Multinomial|TruncatedNormal|ParameterizedTruncated"
    r"|SampleDistorted|Rng|Stateful(Uniform|Standard|Random|Truncated)"
    r"|\w+CandidateSampler"
)


def sharded(
    records: tf.data.Dataset,
    decode: Callable[..., Any],
    batch_size: int,
    *,
    finish: Callable[..., Any] | None = None,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """Global batches of records, of which a worker decodes its rows only.

    For `fit`, `evaluate`, and anything else that takes a dataset of batches:
    it is one. Under several replicas the undecoded records are split, and each
    replica's are decoded; the numbers are those of
    `records.map(decode).batch(batch_size).map(finish)`. Every worker reads all
    records: leave in them what is small, such as the bytes of a file.

    Its `take`, `skip`, `repeat`, `prefetch` and `with_options` are sharded
    too. Anything else makes an ordinary dataset of it, with the same batches,
    of which each worker decodes all rows. Shuffle the records.

    Args:
        records: single records, in the same order on all workers, with a seed
            in each where decoding draws.
        decode: makes an example of a record, as in `Dataset.map`.
        batch_size: rows of a global batch.
        finish: changes the decoded rows of a batch, or of a part of one, each
            row by itself, whatever the others are.
        drop_remainder: leaves out a last batch of fewer rows.

    Raises:
        InputError: for arguments of other kinds, and where `decode` or
            `finish` draws from a generator of the process, which gives each
            worker other numbers.
    """
    if not isinstance(records, tf.data.Dataset):
        raise InputError(
            f"records is a {type(records).__name__}; pass a tf.data.Dataset "
            "of single, undecoded records."
        )
    is_whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not is_whole or batch_size < 1:
        raise InputError(
            f"batch_size={batch_size!r} must be a whole number of at least 1."
        )
    _check_draws("decode", decode, records.element_spec)
    examples = records.map(decode, tf.data.AUTOTUNE, deterministic=True)
    whole = examples.batch(batch_size, drop_remainder=drop_remainder)
    if finish is not None:
        _check_draws("finish", finish, whole.element_spec)
        before = _rows(whole.element_spec)
        whole = whole.map(finish, tf.data.AUTOTUNE, deterministic=True)
        after = _rows(whole.element_spec)
        if None not in (before, after) and before != after:
            raise InputError(
                f"finish makes {after} rows of {before}; it must keep each."
            )
    spec = records.element_spec

    # Tensors of fixed shapes form batches, and bytes of any length do.
    def pack(*record) -> Any:
        return _handed_on(tf.nest.map_structure(_packed, record), spec)

    batches = records.map(pack).batch(batch_size, drop_remainder=drop_remainder)

    def unpack(*record) -> Any:
        return _handed_on(
            tf.nest.map_structure(_unpacked, record, _arguments(spec)), spec
        )

    def decoded(rows: Any, count: int | None) -> Any:
        """The examples of some rows of a batch of `batches`."""
        number = tf.shape(tf.nest.flatten(rows)[0], out_type=tf.int64)[0]
        part = tf.data.Dataset.from_tensor_slices(rows).map(unpack).map(decode)
        # All of them are one batch.
        part = part.batch(number)
        if finish is not None:
            part = part.map(finish)
        data = part.get_single_element()
        if count is None:
            return data
        return tf.nest.map_structure(
            lambda each: _with_rows(each, count), data, expand_composites=False
        )

    return Sharded(whole, batches, decoded)


class Sharded(tf.data.Dataset):
    """What `sharded` returns.

    Args:
        whole: the batches, decoded.
        undecoded: the same batches of records, for those who split them.
        decode: examples of rows of records, as `decode(rows, count)`; count
            where it is known before.
    """

    def __init__(
        self,
        whole: tf.data.Dataset,
        undecoded: tf.data.Dataset,
        decode: Callable[[Any, int | None], Any],
    ):
        self._whole = whole
        self.undecoded = undecoded
        self.decode = decode
        super().__init__(tf.data.experimental.to_variant(whole))

    @property
    def element_spec(self) -> Any:
        return self._whole.element_spec

    def take(self, count, name=None) -> "Sharded":
        return self._each(lambda batches: batches.take(count, name))

    def skip(self, count, name=None) -> "Sharded":
        return self._each(lambda batches: batches.skip(count, name))

    def repeat(self, count=None, name=None) -> "Sharded":
        return self._each(lambda batches: batches.repeat(count, name))

    def prefetch(self, buffer_size, name=None) -> "Sharded":
        return self._each(lambda batches: batches.prefetch(buffer_size, name))

    def with_options(self, options, name=None) -> "Sharded":
        return self._each(lambda batches: batches.with_options(options, name))

    def with_records(
        self, change: Callable[[tf.data.Dataset], tf.data.Dataset]
    ) -> "Sharded":
        """The same batches; what workers split passes through `change`."""
        return Sharded(self._whole, change(self.undecoded), self.decode)

    def _each(
        self, change: Callable[[tf.data.Dataset], tf.data.Dataset]
    ) -> "Sharded":
        return Sharded(change(self._whole), change(self.undecoded), self.decode)

    def _inputs(self) -> list[tf.data.Dataset]:
        return [self._whole]


def _check_draws(name: str, function: Callable[..., Any], spec: Any) -> None:
    traced = tf.function(function).get_concrete_function(*_arguments(spec))
    graph = traced.graph.as_graph_def()
    nodes = [
        *graph.node,
        *(n for f in graph.library.function for n in f.node_def),
    ]
    draws = sorted({node.op for node in nodes if _DRAWS.match(node.op)})
    if draws:
        raise InputError(
            f"{name} draws by {', '.join(draws)}, which gives each worker "
            "other numbers; use tf.random.stateless_* with a seed that is in "
            "the record."
        )


def _arguments(spec: Any) -> tuple:
    """How a dataset hands its elements to a function: a tuple in parts."""
    return spec if type(spec) is tuple else (spec,)


def _handed_on(arguments: tuple, spec: Any) -> Any:
    return arguments if type(spec) is tuple else arguments[0]


def _packed(each: Any) -> Any:
    return each if _is_fixed(each) else tf.io.serialize_tensor(each)


def _unpacked(each: Any, spec: Any) -> Any:
    if _is_fixed(spec):
        return each
    return tf.ensure_shape(tf.io.parse_tensor(each, spec.dtype), spec.shape)


def _is_fixed(each: Any) -> bool:
    is_dense = isinstance(each, tf.Tensor | tf.TensorSpec)
    return not is_dense or each.shape.is_fully_defined()


def _rows(spec: Any) -> int | None:
    shape = getattr(tf.nest.flatten(spec)[0], "shape", None)
    return None if shape is None or shape.rank is None else shape[0]


def _with_rows(tensor: Any, count: int) -> Any:
    if isinstance(tensor, tf.Tensor):
        tensor.set_shape([count, *tensor.shape[1:]])
    return tensor
