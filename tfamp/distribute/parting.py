"""Workers that end together."""

import contextlib
import itertools

import tensorflow as tf

from tfamp.distribute.consensus import number_of_workers
from tfamp.distribute.texts import put, waited_for
from tfamp.errors import WorkerLostError

_partings = itertools.count()


def part(strategy: tf.distribute.Strategy) -> None:
    """Waits until each worker has what the others sent to it.

    A program that ends right after its last all-reduce may take with it what
    another has still to read of it, which then takes this one for lost. All
    workers must call it together.

    Args:
        strategy: of one worker, which waits for nobody, or of several.
    """
    count = number_of_workers(strategy)
    if count == 1:
        return
    own = strategy.cluster_resolver.task_id
    prefix = f"tfamp/parting/{next(_partings)}"
    # What there was to do together is done, whoever has ended meanwhile. The
    # first keeps the texts, and may end before its last one was read.
    with contextlib.suppress(tf.errors.OpError, WorkerLostError):
        if own == 0:
            for worker in range(1, count):
                waited_for(f"{prefix}/{worker}", worker)
            put(f"{prefix}/0", "all are done")
        else:
            put(f"{prefix}/{own}", "done")
            waited_for(f"{prefix}/0", 0)
