"""A resumed run sees the batches that it would have seen."""

import itertools
import random

import numpy as np
import pytest
import tensorflow as tf

import tfamp
from recipes.data.images import with_seeds
from tests.conftest import mostly_slow
from tfamp.checkpoint.data_position import (
    advance,
    carries_state_between_epochs,
    made_anew,
)
from tfamp.distribute import strategy as strategy_lib
from tfamp.distribute.strategy import distribute_batches
from tfamp.errors import Preempted

range_ = tf.data.Dataset.range


def shuffled():
    return range_(40).shuffle(40, seed=3)


def shuffled_by_the_global_seed():
    return range_(40).shuffle(40)


def seeds_that_travel():
    dataset = with_seeds(range_(40).shuffle(10, seed=3), seed=5)
    return dataset.map(lambda x, s: (x, tf.random.stateless_uniform([], s)))


def cached_before_the_shuffle():
    return range_(40).cache().shuffle(10, seed=3)


def interleaved_files():
    def file(i):
        return range_(i * 10, i * 10 + 10).shuffle(10, seed=1)

    files = range_(4).shuffle(4, seed=2)
    return files.interleave(file, 4, num_parallel_calls=4).prefetch(2)


def sampled():
    one, other = range_(100).shuffle(9, seed=1), range_(100, 200)
    sample = tf.data.Dataset.sample_from_datasets
    return sample([one, other], [0.5, 0.5], seed=4).take(40)


def shuffled_and_repeated():
    return range_(20).shuffle(20, seed=3).repeat(2)


def shuffled_and_cached():
    return range_(40).shuffle(10, seed=3).cache()


def concatenated():
    second = range_(20, 40).shuffle(20, seed=1)
    return range_(20).shuffle(20, seed=1).concatenate(second)


def with_a_generator():
    generator = tf.random.Generator.from_seed(1)
    return range_(40).map(lambda x: (x, generator.uniform([])))


def from_python():
    def rows():
        order = list(range(40))
        random.shuffle(order)
        yield from order

    spec = tf.TensorSpec((), tf.int64)
    return tf.data.Dataset.from_generator(rows, output_signature=spec)


NEVER_READ = [
    shuffled,
    shuffled_by_the_global_seed,
    seeds_that_travel,
    cached_before_the_shuffle,
    interleaved_files,
    sampled,
]
READ = [
    shuffled_and_repeated,
    shuffled_and_cached,
    concatenated,
    with_a_generator,
    from_python,
]
STEPS = 10


def make(pipeline):
    """As a process that has just started makes it."""
    random.seed(0)
    tf.random.set_seed(0)
    return pipeline().batch(4)


def values(strategy, iterator, count):
    """The next batches, as numbers; a replica's after another's."""
    rows = []
    for _ in range(count):
        for tensor in tf.nest.flatten(next(iterator)):
            locals_ = strategy.experimental_local_results(tensor)
            rows.extend(np.ravel(each).tolist() for each in locals_)
    return rows


@pytest.mark.parametrize(
    ("pipeline", "replicas"),
    mostly_slow(
        itertools.product(NEVER_READ + READ, (1, 2)),
        always=[(pipeline, 1) for pipeline in NEVER_READ[:1] + READ[:1]],
    ),
)
def test_the_next_batch_is_the_one_that_came_next(pipeline, replicas, mirrored):
    check_goes_on(mirrored(replicas), pipeline)


@pytest.mark.parametrize(
    "pipeline", mostly_slow(NEVER_READ + READ, always=[shuffled])
)
def test_so_it_is_where_batches_are_brought_to_a_gpu(pipeline, monkeypatch):
    # Another device of this host stands for it.
    monkeypatch.setattr(strategy_lib, "computes_on_gpus", lambda _: True)
    monkeypatch.setattr(strategy_lib, "devices_of", lambda _: ["/CPU:1"])
    check_goes_on(tf.distribute.get_strategy(), pipeline)


def check_goes_on(strategy, pipeline):
    batches = distribute_batches(strategy, make(pipeline))
    epochs = []
    for _ in range(4):
        iterator = iter(batches)
        epochs.append(values(strategy, iterator, STEPS))
    assert pipeline is shuffled_and_cached or epochs[1] != epochs[2]

    dataset = make(pipeline)
    batches = distribute_batches(strategy, dataset)
    iterator = advance(batches, dataset, epochs=2, steps=3)
    per_step = len(epochs[2]) // STEPS
    assert values(strategy, iterator, 7) == epochs[2][3 * per_step :]
    # And in the epoch after it.
    iterator = iter(batches)
    assert values(strategy, iterator, STEPS) == epochs[3]


@pytest.mark.parametrize("pipeline", NEVER_READ)
def test_earlier_epochs_are_not_read_where_that_changes_nothing(pipeline):
    assert not carries_state_between_epochs(make(pipeline))


@pytest.mark.parametrize("pipeline", READ)
def test_earlier_epochs_are_read_where_that_matters(pipeline):
    assert carries_state_between_epochs(make(pipeline))


@pytest.mark.parametrize("replicas", mostly_slow([1, 2], always=[1]))
def test_one_iterator_without_end_goes_on(replicas, mirrored):
    strategy = mirrored(replicas)

    def endless():
        return range_(40).shuffle(20, seed=3).repeat()

    whole = iter(distribute_batches(strategy, make(endless)))
    expected = values(strategy, whole, 630)
    dataset = make(endless)
    batches = distribute_batches(strategy, dataset)
    iterator = advance(batches, dataset, epochs=0, steps=600)
    per_step = len(expected) // 630
    assert values(strategy, iterator, 30) == expected[600 * per_step :]


def test_data_that_end_before_are_an_error():
    dataset = make(shuffled)
    with pytest.raises(tfamp.InputError, match="end after 10 batches"):
        advance(dataset, dataset, epochs=0, steps=11)


@pytest.mark.parametrize(
    "make",
    [
        lambda data: data.shuffle(8, seed=1),
        lambda data: data.shuffle(8, seed=1).repeat(2).shuffle(16, seed=2),
        lambda data: data.cache().shuffle(8, seed=1),
        lambda data: data.shuffle(8, seed=1).cache(),
    ],
)
def test_a_used_dataset_is_made_anew(make):
    def passes(dataset):
        return [[int(x) for x in dataset] for _ in range(3)]

    used = make(tf.data.Dataset.range(8))
    expected = passes(used)
    assert passes(made_anew(used)) == expected


def test_sigterm_ends_the_skipping():
    data = tf.data.Dataset.range(8)
    with pytest.raises(Preempted):
        advance(data, data, epochs=1, steps=2, is_ended=lambda: True)
