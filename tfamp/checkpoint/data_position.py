"""Finds the place in the data where a run stopped.

TensorFlow can save an iterator that feeds one device, but none that feeds
several replicas. Going there again works under every strategy: a pipeline
repeats itself as long as its seeds are set.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from absl import logging

from tfamp.errors import InputError

# Enough to hide Python, few enough that an interrupt is heard soon.
_BATCHES_PER_CALL = 256

# These make an iterator of what they read from while they are read, not when
# their own iterator is made.
_LAZY = ("Repeat", "Concatenate", "Cache")
_RANDOM = ("Shuffle", "RandomDataset")
# State that goes on from one epoch to the next: generators, and Python.
_STATEFUL = ("RngReadAndSkip", "RngSkip", "PyFunc")


def advance(
    batches: tf.data.Dataset | tf.distribute.DistributedDataset,
    dataset: tf.data.Dataset,
    *,
    epochs: int,
    steps: int,
) -> Iterator[Any]:
    """An iterator that goes on where a run stopped.

    A shuffle draws the seed of its next order when an iterator is made. The
    iterators of earlier epochs are therefore made, and read only where the
    pipeline needs that to come to the same state: where it shuffles before
    `repeat`, `concatenate` or `cache`, holds a `tf.random.Generator`, or runs
    Python code.

    Exact for pipelines that are made anew, with the same seeds, by each
    process, and are deterministic: of an unseeded `shuffle` TensorFlow
    derives the seed from `keras.utils.set_random_seed`. Not exact, since such
    a pipeline does not even repeat itself: `deterministic=False`; stateful
    random ops in a parallel `map`; a `shuffle` without any seed.

    Args:
        batches: what is iterated, from `distribute_batches`.
        dataset: what it was made from.
        epochs: iterators that the run had used up before.
        steps: batches that it had taken from the one after them.

    Returns:
        The iterator; its next batch is the one that came next in the run.

    Raises:
        InputError: where the data end before.
    """
    begin = time.monotonic()
    reads = epochs > 0 and carries_state_between_epochs(dataset)
    skip = _skipping()
    for _ in range(epochs):
        iterator = iter(batches)
        if reads:
            while skip(iterator, _BATCHES_PER_CALL) == _BATCHES_PER_CALL:
                pass
    iterator = iter(batches)
    left = steps
    while left:
        skipped = skip(iterator, min(left, _BATCHES_PER_CALL))
        left -= skipped
        if not skipped:
            raise InputError(
                f"The data end after {steps - left} batches, but the run to "
                f"resume had taken {steps}; resume with the data it had."
            )
    if epochs or steps:
        logging.info(
            "Resuming the data after %d epochs%s and %d batches took %.1f s.",
            epochs,
            ", read again," if reads else "",
            steps,
            time.monotonic() - begin,
        )
    return iterator


def carries_state_between_epochs(dataset: tf.data.Dataset) -> bool:
    """Whether an epoch's data depend on the earlier ones having been read."""
    try:
        serialized = tf.raw_ops.DatasetToGraphV2(
            input_dataset=tf.data.experimental.to_variant(dataset),
            # 1: leave out the state of lookup tables and the like.
            external_state_policy=1,
        )
    except tf.errors.OpError:
        # Data in memory of more than 2 GB, or a source of the user's own.
        return True
    graph = tf.compat.v1.GraphDef.FromString(serialized.numpy())
    functions = [node for f in graph.library.function for node in f.node_def]
    if any(_is(node, _STATEFUL) for node in [*functions, *graph.node]):
        return True
    nodes = {node.name: node for node in graph.node}
    return any(
        _is(node, _LAZY) and _reads_from_random(node, nodes)
        for node in graph.node
    )


def _reads_from_random(node, nodes) -> bool:
    inputs = [nodes[name.lstrip("^").split(":")[0]] for name in node.input]
    return any(
        _is(each, _RANDOM) or _reads_from_random(each, nodes) for each in inputs
    )


def _is(node, parts: tuple[str, ...]) -> bool:
    return any(part in node.op for part in parts)


def _skipping() -> Callable[[Iterator[Any], int], int]:
    """A function that takes so many batches, or what there is: how many."""
    with tf.device("CPU:0"):
        # Survives the error that ends the data.
        done = tf.Variable(0, dtype=tf.int64, trainable=False)

    @tf.function(reduce_retracing=True)
    @tf.autograph.experimental.do_not_convert
    def take(iterator, count):
        def body(i):
            taken = iterator.get_next()
            # Else it would count while the data end.
            with tf.control_dependencies(
                tf.nest.flatten(taken, expand_composites=True)
            ):
                done.assign_add(1)
            return i + 1

        tf.while_loop(lambda i: i < count, body, [0], parallel_iterations=1)

    def skip(iterator: Iterator[Any], count: int) -> int:
        before = int(done.numpy())
        with contextlib.suppress(tf.errors.OutOfRangeError):
            take(iterator, tf.constant(count))
        return int(done.numpy()) - before

    return skip
