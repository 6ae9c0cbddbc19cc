"""Values that each replica holds for itself.

Metrics count the rows that their replica saw, and between epochs' ends so do
the moving statistics of batch normalization. TensorFlow saves the sum of the
former and one replica's of the latter; a run that goes on from those is
another run.
"""

from collections.abc import Mapping, Sequence

import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.distribute import reduction

# By the number of bytes.
_INTEGERS = {1: tf.int8, 2: tf.int16, 4: tf.int32, 8: tf.int64}


class ReplicaState:
    """The variables whose values may differ between replicas.

    All workers must call its methods together: they communicate.

    Args:
        strategy: the one that the variables were made under.
        variables: what may differ; a variable that is read across replicas
            (`ON_READ`) always counts as different.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        variables: Sequence[tf.Variable],
    ):
        self._strategy = strategy
        self._variables = list(variables)
        graph_function = tensorflow_internals.graph_function
        self._gather = graph_function(self._gather_now)
        self._fingerprint = graph_function(self._fingerprint_now)
        self._assign = graph_function(self._assign_now, relaxes=True)

    def read(self) -> dict[int, tf.Tensor]:
        """By position of the variable: a row for each replica.

        Left out are variables that are the same on all replicas.
        """
        is_different = [is_read_together(v) for v in self._variables]
        if self._strategy.num_replicas_in_sync > 1:
            for position, column in enumerate(self._fingerprint().numpy().T):
                is_different[position] |= bool((column != column[0]).any())
        positions = tuple(i for i, is_in in enumerate(is_different) if is_in)
        rows = self._gather(positions) if positions else []
        return dict(zip(positions, rows, strict=True))

    def assign(self, rows: Mapping[int, tf.Tensor]) -> None:
        """Gives each replica its value again.

        Where their number is another one now, all get the mean, as at an
        epoch's end; of what counts rows, the first replica gets the sum.
        """
        if rows:
            replicas = self._strategy.num_replicas_in_sync
            self._assign(
                tuple(rows),
                [
                    self._spread(self._variables[position], row, replicas)
                    for position, row in rows.items()
                ],
            )

    def _spread(self, variable, rows, replicas: int) -> tf.Tensor:
        if rows.shape[0] == replicas:
            return rows
        aggregation = variable.aggregation
        if aggregation == tf.VariableAggregation.SUM:
            rest = tf.zeros([replicas - 1, *rows.shape[1:]], rows.dtype)
            return tf.concat([tf.reduce_sum(rows, axis=0)[None], rest], axis=0)
        value = (
            rows[0]
            if aggregation == tf.VariableAggregation.ONLY_FIRST_REPLICA
            or not rows.dtype.is_floating
            else tf.reduce_mean(rows, axis=0)
        )
        return tf.repeat(value[None], replicas, axis=0)

    def _fingerprint_now(self) -> tf.Tensor:
        """int64 [replicas, variables]: the sum of each value's bits."""

        def fingerprint():
            sums = tf.stack([*map(_sum_of_bits, self._variables)])
            return reduction.gather([sums])[0]

        return self._first(self._strategy.run(fingerprint))

    def _gather_now(self, positions: tuple[int, ...]) -> list[tf.Tensor]:
        def gather():
            return reduction.gather(
                [
                    tf.convert_to_tensor(self._variables[position])
                    for position in positions
                ]
            )

        return [self._first(rows) for rows in self._strategy.run(gather)]

    def _assign_now(self, positions: tuple[int, ...], rows) -> None:
        def assign():
            replica = tf.distribute.get_replica_context()
            index = replica.replica_id_in_sync_group
            for position, row in zip(positions, rows, strict=True):
                self._variables[position].assign(tf.gather(row, index))

        self._strategy.run(assign)

    def _first(self, values) -> tf.Tensor:
        """All replicas hold the same after a gather."""
        return self._strategy.experimental_local_results(values)[0]


def is_read_together(variable: tf.Variable) -> bool:
    """Whether its value is what the replicas' values add up to."""
    return variable.synchronization == tf.VariableSynchronization.ON_READ


def gather_number(strategy: tf.distribute.Strategy, number: int) -> list[int]:
    """Each replica's number, which is its worker's, on all workers."""

    def gather():
        return reduction.gather([tf.constant(number, tf.int64)])[0]

    rows = strategy.run(gather)
    return strategy.experimental_local_results(rows)[0].numpy().tolist()


def _sum_of_bits(variable: tf.Variable) -> tf.Tensor:
    value = tf.convert_to_tensor(variable)
    if value.dtype.is_floating:
        value = tf.bitcast(value, _INTEGERS[value.dtype.size])
    return tf.reduce_sum(tf.cast(value, tf.int64))
