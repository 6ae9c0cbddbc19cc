"""What is timed of a run: its own steps, settled, without the first ones."""

import itertools

import keras
import pytest
import tensorflow as tf

import tfamp
from tfamp.analysis.bench import clock
from tfamp.analysis.bench.clock import FiguresAreIn, Phase, StepTimer
from tfamp.analysis.bench.feed import Feed, in_memory, rebatched
from tfamp.training.observers import Observer, observing


class FeedLog:
    """Says what a `Feed` was told."""

    rows = 8

    def __init__(self):
        self.told = []

    def hold(self, is_held):
        self.told.append(is_held)


def timer_after(windows, steps=4):
    """A timer that saw windows of so many (steps, seconds), and its feed."""
    now = itertools.accumulate(
        itertools.chain.from_iterable((0, seconds) for _, seconds in windows)
    )
    # The clock is asked before a window begins and when it ends.
    ticks = itertools.chain([0.0], itertools.islice(now, 1, None))
    feed = FeedLog()
    timer = StepTimer(feed, steps, now=lambda: next(ticks))
    timer.on_train_begin()
    timer.on_epoch_begin(0)
    last = -1
    try:
        for count, _ in windows:
            last += count
            timer.on_train_batch_end(last, {"skipped_steps": 0})
    except FiguresAreIn:
        return timer, feed
    return None, feed


def test_slow_first_windows_are_no_part_of_a_steps_time():
    phase = Phase(steps=3)
    for steps, seconds in [(1, 9.0), (2, 8.0), (4, 7.0), (4, 6.0)]:
        phase.add(steps, seconds)
        assert phase.windows == []
    assert phase.warm_up_steps == 11
    for _ in range(3):
        assert not phase.is_done
        phase.add(4, 0.008)
    assert phase.is_done
    assert phase.step_milliseconds == pytest.approx(2.0)


def test_one_slow_window_does_not_move_the_median():
    phase = Phase(steps=1, call_steps=5)
    for seconds in (9.0, 1.0, 1.0, 60.0, 1.5, 1.0):
        phase.add(5, seconds)
    assert phase.step_milliseconds == pytest.approx(200.0)


def test_calls_that_never_get_alike_are_timed_all_the_same():
    phase = Phase(steps=1)
    for steps in (3, 1) * 6:
        assert not phase.is_settled
        phase.add(steps, 1.0)
    assert phase.is_settled


def test_a_phase_lasts_for_the_steps_that_were_asked_for():
    phase = Phase(steps=100, call_steps=10)
    for _ in range(10):
        phase.add(10, 1.0)
    assert not phase.is_done
    phase.add(10, 1.0)
    assert phase.is_done


def test_a_run_is_timed_on_its_own_data_and_then_on_data_in_memory():
    compiling = [(1, 5.003)]
    own = [(1, 0.9)] * 5 + [(1, 0.004)] * 4
    held = [(1, 0.9)] * 5 + [(1, 0.003)] * 4
    timer, feed = timer_after([*compiling, *own, *held])
    figures = timer.figures()
    assert figures["step_milliseconds"] == pytest.approx(4.0)
    assert figures["in_memory_step_milliseconds"] == pytest.approx(3.0)
    assert figures["input_share"] == pytest.approx(0.25)
    assert figures["examples_per_second"] == pytest.approx(2000.0)
    assert figures["compile_seconds"] == pytest.approx(5.0)
    assert (figures["warm_up_steps"], figures["timed_steps"]) == (5, 4)
    # The first call compiles, and does not wait for the pipeline.
    assert feed.told == [True, False, True]


def test_only_skips_of_timed_steps_count():
    feed = FeedLog()
    timer = StepTimer(feed, 5, now=itertools.count().__next__)
    timer.on_train_begin()
    timer.on_epoch_begin(0)
    # One while it compiles, three while it warms up, two afterwards.
    skips = [1, 2, 3, 4, 4, 4, 5, 5, 6, 6, 6]
    for batch, skipped in enumerate(skips):
        timer.on_train_batch_end(batch, {"skipped_steps": skipped})
    assert timer.own.is_done
    assert timer.skipped_steps == 2


class FirstWindows(clock.StepTimer):
    """Remembers how many steps the first windows had, and leaves."""

    def on_window(self, steps, seconds, logs):
        seen = vars(self).setdefault("seen", [])
        seen.append(steps)
        super().on_window(steps, seconds, logs)
        if len(seen) == 6:
            raise FiguresAreIn


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile(tfamp.wrap_optimizer(keras.optimizers.SGD(0.0)), loss="mse")
    return model


@pytest.fixture
def batches():
    rows = tf.range(20, dtype=tf.float32)
    data = tf.data.Dataset.from_tensor_slices((tf.stack([rows, rows], 1), rows))
    return data.batch(8)


def test_timing_leaves_it_to_fit_how_many_steps_go_into_a_call(model, batches):
    feed = Feed()
    timer = FirstWindows(feed, steps=1)
    with (
        pytest.raises(FiguresAreIn),
        observing(Observer([timer], feed.change)),
    ):
        tfamp.fit(model, batches, verbose=0)
    # A callback that watched batches would make it 1 each time.
    assert timer.seen == [1, 1, 2, 4, 8, 16]
    assert timer.first_call_seconds > 0


def test_data_in_memory_are_the_same_batches(batches):
    first_two = list(batches.take(2).as_numpy_iterator())
    held = in_memory(list(batches.take(2)))
    for found, wanted in zip(
        held.take(4).as_numpy_iterator(), first_two * 2, strict=True
    ):
        tf.nest.map_structure(
            lambda a, b: (a == b).all() or pytest.fail(f"{a} is not {b}"),
            found,
            wanted,
        )


def test_the_feed_switches_between_the_recipes_data_and_those_in_memory():
    # A thousand batches of 8 that all differ; two of them are held.
    data = tf.data.Dataset.range(1000 * 8).batch(8, drop_remainder=True)
    feed = Feed()
    iterator = iter(feed.change(data))

    def next_batches():
        # TensorFlow has prepared some before the switch, more where the
        # machine is busy.
        found = [int(next(iterator)[0]) for _ in range(100)]
        return found[-6:]

    assert next_batches() == [*range(94 * 8, 100 * 8, 8)]
    feed.hold(True)
    assert sorted(next_batches()) == [0, 0, 0, 8, 8, 8]
    feed.hold(False)
    # They go on where they were left.
    own = next_batches()
    assert own == [*range(own[0], own[0] + 48, 8)]
    assert 100 * 8 < own[0] < 300 * 8


def test_the_feed_repeats_and_leaves_out_a_partial_last_batch(batches):
    feed = Feed()
    data = feed.change(batches)
    assert [len(y) for _, y in data.take(5)] == [8] * 5
    assert feed.rows == 8


def test_a_feed_needs_a_batch():
    empty = tf.data.Dataset.range(0).batch(8)
    with pytest.raises(tfamp.InputError, match="before the first batch"):
        Feed().change(empty)


def test_a_batch_may_be_larger_than_the_data(batches):
    x, y = next(iter(rebatched(batches, 50)))
    assert x.shape == (50, 2)
    assert y.numpy()[:22].tolist() == [*range(20), 0, 1]
