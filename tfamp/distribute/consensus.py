"""Decisions that all workers must take alike.

A worker that reports, stops or saves where another goes on would wait for it
for ever in the next all-reduce. Whatever hangs on time, on a signal or on a
callback is agreed on first.
"""

import tensorflow as tf

from tfamp import tensorflow_internals


class Consensus:
    """Asks all workers of a strategy; costs one small all-reduce a question.

    Args:
        strategy: of one worker, where no question costs anything, or several.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self._is_alone = number_of_workers(strategy) == 1

        @tensorflow_internals.graph_function
        def mean(values):
            per_replica = strategy.run(lambda: tf.identity(values))
            return strategy.reduce("MEAN", per_replica, axis=None)

        self._mean = mean

    def mean(self, *values: float) -> list[float]:
        """The mean over workers of each value, the same on all of them."""
        if self._is_alone:
            return list(values)
        means = self._mean(tf.constant(values, tf.float64))
        return [float(value) for value in means.numpy()]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker."""
        return self.mean(float(flag))[0] > 0


def number_of_workers(strategy: tf.distribute.Strategy) -> int:
    """How many processes train together; a TPU pod has one."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 1
    local = len(strategy.extended.worker_devices)
    return strategy.num_replicas_in_sync // local


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes files."""
    return strategy.extended.should_checkpoint
