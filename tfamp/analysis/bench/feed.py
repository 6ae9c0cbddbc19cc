"""The data of a measured run: the recipe's own, or some of them held in memory.

Which of the two comes next is decided while the run goes on, so that both are
measured in one process, on one compiled step.
"""

import functools
from typing import Any

import tensorflow as tf

from tfamp.distribute.strategy import count_rows, static_rows
from tfamp.errors import InputError

# Enough that a step does not see the same batch each time, few enough that
# they hardly count in the memory of the process.
_HELD_BATCHES = 2

# `fit` takes no endless dataset without a number of steps; this one ends
# later than any measurement.
_NEVER = 2**40


class Feed:
    """The training data of a recipe, repeated, with a switch.

    Batches of another size than the first one are left out: the last batch of
    an epoch would make XLA compile again.

    Attributes:
        rows: of every batch, once `change` was called.
        element_spec: of the dataset, once `change` was called.
    """

    def __init__(self):
        self.rows = 0
        self.element_spec: Any = None
        with tf.device("CPU:0"):
            # Read by the pipeline, for each batch.
            self._is_held = tf.Variable(0, dtype=tf.int64, trainable=False)

    def hold(self, is_held: bool) -> None:
        """Whether the next batches are those in memory.

        Some batches that are prefetched come before.
        """
        self._is_held.assign(int(is_held))

    def change(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """What takes the place of a recipe's dataset, for `Observer`.

        Raises:
            InputError: the dataset yields nothing.
        """
        batches = list(dataset.take(_HELD_BATCHES))
        if not batches:
            raise InputError("The dataset ended before the first batch.")
        self.rows = rows = int(count_rows(batches[0]))
        if static_rows(dataset.element_spec) is None:
            dataset = dataset.filter(lambda *batch: count_rows(batch) == rows)
        held = in_memory([b for b in batches if int(count_rows(b)) == rows])
        # Not a map: TensorFlow makes that parallel, and so runs far ahead.
        switch = tf.data.Dataset.counter().scan(
            0, lambda state, _: (state, self._is_held.read_value())
        )
        both = tf.data.Dataset.choose_from_datasets(
            [dataset.repeat(), held], switch
        )
        self.element_spec = both.element_spec
        return both.take(_NEVER)


def in_memory(batches: list[Any]) -> tf.data.Dataset:
    """Yields the batches in turn, without end; they are ready beforehand."""
    datasets = [tf.data.Dataset.from_tensors(batch) for batch in batches]
    return functools.reduce(lambda a, b: a.concatenate(b), datasets).repeat()


def rebatched(dataset: tf.data.Dataset, rows: int) -> tf.data.Dataset:
    """The dataset, repeated, in batches of so many rows, however few it has."""
    batches = dataset.repeat().rebatch(rows, drop_remainder=True)
    return batches.take(_NEVER)
