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

from tfamp.distribute.strategy import before_devices
from tfamp.errors import InputError, Preempted

# Enough to hide Python, few enough that an interrupt is heard soon.
_BATCHES_PER_CALL = 256

# These make an iterator of what they read from while they are read, not when
# their own iterator is made.
_LAZY = ("Repeat", "Concatenate", "Cache")
_RANDOM = ("Shuffle", "RandomDataset")
# State that goes on from one epoch to the next: generators, and Python.
_STATEFUL = ("RngReadAndSkip", "RngSkip", "PyFunc")
# Which input holds what iterators leave behind, and what makes a blank one.
_MARKED = {
    "ShuffleDatasetV3": (4, "DummySeedGenerator"),
    "ShuffleAndRepeatDatasetV2": (5, "DummySeedGenerator"),
    "RandomDatasetV2": (2, "DummySeedGenerator"),
    "CacheDatasetV2": (2, "DummyMemoryCache"),
}


def advance(
    batches: tf.data.Dataset | tf.distribute.DistributedDataset,
    dataset: tf.data.Dataset,
    *,
    epochs: int,
    steps: int,
    is_ended: Callable[[], bool] = lambda: False,
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
        is_ended: whether this process was told to end.

    Returns:
        The iterator; its next batch is the one that came next in the run.

    Raises:
        InputError: where the data end before.
        Preempted: where this process was told to end.
    """
    begin = time.monotonic()
    reads = epochs > 0 and carries_state_between_epochs(dataset)
    take = _skipping()

    def skip(iterator: Iterator[Any], count: int) -> int:
        if is_ended():
            raise Preempted(
                "SIGTERM: nothing was trained yet; start the same command "
                "again to go on."
            )
        return take(iterator, count)

    for epoch in range(epochs):
        iterator = iter(before_devices(batches))
        if reads:
            while skip(iterator, _BATCHES_PER_CALL) == _BATCHES_PER_CALL:
                pass
        elif epoch == 0 and not steps:
            # Tells whether the data are the same.
            skip(iterator, 1)
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


def made_anew(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The pipeline as when it was made, before anything was read from it.

    Every iterator of a dataset that shuffles or caches leaves its mark on the
    dataset. Of a copy through its graph, these marks can be left out.
    """
    graph = _graph_of(dataset)
    if graph is None:
        return dataset
    for node in list(graph.node):
        if node.op in _MARKED:
            place, blank = _MARKED[node.op]
            added = graph.node.add()
            added.op = blank
            added.name = f"{node.name.replace('/', '_')}_anew"
            node.input[place] = added.name
    (end,) = [node.input[0] for node in graph.node if node.op == "_Retval"]
    end = end if ":" in end else f"{end}:0"
    imported = tf.compat.v1.wrap_function(
        lambda: tf.graph_util.import_graph_def(
            graph, return_elements=[end], name=""
        ),
        [],
    )
    copy = tf.data.experimental.from_variant(
        imported()[0], dataset.element_spec
    )
    # Its functions live as long as it does, and what they use.
    copy.tfamp_source = (imported, dataset)
    return copy


def carries_state_between_epochs(dataset: tf.data.Dataset) -> bool:
    """Whether an epoch's data depend on the earlier ones having been read."""
    graph = _graph_of(dataset)
    if graph is None:
        return True
    functions = [node for f in graph.library.function for node in f.node_def]
    if any(_is(node, _STATEFUL) for node in [*functions, *graph.node]):
        return True
    nodes = {node.name: node for node in graph.node}
    return any(
        _is(node, _LAZY) and _reads_from_random(node, nodes)
        for node in graph.node
    )


def _graph_of(dataset: tf.data.Dataset) -> tf.compat.v1.GraphDef | None:
    """None for more than 2 GB in memory, or a source of the user's own."""
    try:
        serialized = tf.raw_ops.DatasetToGraphV2(
            input_dataset=tf.data.experimental.to_variant(dataset),
            # 1: leave out the state of lookup tables and the like.
            external_state_policy=1,
        )
    except tf.errors.OpError:
        return None
    return tf.compat.v1.GraphDef.FromString(serialized.numpy())


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
