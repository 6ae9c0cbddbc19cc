"""scale.jsonl: each move of the scale, at its step."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfamp
from tests.conftest import first_always
from tfamp.overflow.watch import ScaleEvent
from tfamp.training.callbacks import ScaleTimeline

STEPS = 10


def build(strategy, growth_steps=3):
    """In float32 with a scale that moves: NaN overflows at any scale."""
    with strategy.scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        optimizer = tfamp.LossScaleOptimizer(
            keras.optimizers.SGD(0.01),
            initial_scale=8.0,
            dynamic_growth_steps=growth_steps,
            max_scale=16.0,
        )
        model.compile(optimizer, "mse", auto_scale_loss=False)
    return model


def data(bad_steps, steps=STEPS):
    x = np.ones((steps, 4, 2), "float32")
    x[[step - 1 for step in bad_steps], 2] = np.nan
    dataset = tf.data.Dataset.from_tensor_slices((x, np.ones((steps, 4, 1))))
    return dataset.map(lambda x, y: (tf.ensure_shape(x, (4, 2)), y))


def lines(folder):
    text = (folder / "scale.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def moves(folder):
    return [
        (line["step"], line["epoch"], line["reason"], line["scale"])
        for line in lines(folder)
    ]


@pytest.mark.parametrize(
    ("replicas", "steps_per_loop"),
    first_always([(1, 1), (1, 7), (2, 7), (4, 7)], 2),
)
def test_each_line_has_the_step_at_which_the_scale_moved(
    mirrored, tmp_path, replicas, steps_per_loop
):
    tfamp.fit(
        build(mirrored(replicas)),
        data([2, 3, 10]),
        epochs=2,
        steps_per_loop=steps_per_loop,
        on_overflow="ignore",
        callbacks=[ScaleTimeline(tmp_path)],
        verbose=0,
    )
    # Grows after three clean steps in a row, never beyond 16.
    assert moves(tmp_path) == [
        (0, 0, "start", 8.0),
        (2, 0, "overflow", 4.0),
        (3, 0, "overflow", 2.0),
        (6, 0, "growth", 4.0),
        (9, 0, "growth", 8.0),
        (10, 0, "overflow", 4.0),
        (12, 1, "overflow", 2.0),
        (13, 1, "overflow", 1.0),
        (16, 1, "growth", 2.0),
        (19, 1, "growth", 4.0),
        (20, 1, "overflow", 2.0),
    ]
    assert not any(line["at_fault"] for line in lines(tmp_path))


def test_an_overflow_that_was_replayed_says_who_it_was(mirrored, tmp_path):
    tfamp.fit(
        build(mirrored(2)),
        data([4]),
        on_overflow="blame",
        callbacks=[ScaleTimeline(tmp_path)],
        verbose=0,
    )
    line = lines(tmp_path)[2]
    message = line.pop("message")
    assert message.endswith("in row 2 of the batch on replica 1.")
    assert line == {
        "step": 4,
        "epoch": 0,
        "optimizer": None,
        "scale": 8.0,
        "reason": "overflow",
        "at_fault": "data",
        "replica": 1,
        "worker": 0,
        "layer": None,
    }


class Stop(keras.callbacks.Callback):
    """Ends the run as a kill would, after so many epochs."""

    def __init__(self, epochs):
        super().__init__()
        self._epochs = epochs

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self._epochs:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_resumes_counts_its_steps_on(mirrored, tmp_path):
    def run(*callbacks):
        tfamp.fit(
            build(mirrored(2), growth_steps=100),
            data([3]),
            epochs=3,
            on_overflow="ignore",
            checkpoint_dir=tmp_path / "checkpoints",
            callbacks=[ScaleTimeline(tmp_path), *callbacks],
            verbose=0,
        )

    with pytest.raises(KeyboardInterrupt):
        run(Stop(2))
    # As a machine leaves it that loses power.
    with open(tmp_path / "scale.jsonl", "a") as file:
        file.write('{"step": 23, "epo')
    run()
    assert moves(tmp_path) == [
        (0, 0, "start", 8.0),
        (3, 0, "overflow", 4.0),
        (13, 1, "overflow", 2.0),
        (20, 2, "resumed", 2.0),
        (23, 2, "overflow", 1.0),
    ]


def test_a_scale_that_something_else_sets_is_told_so(tmp_path):
    class Set(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.model.optimizer.dynamic_scale.assign(2.0)

    tfamp.fit(
        build(tf.distribute.get_strategy(), growth_steps=4),
        data([], steps=4),
        callbacks=[ScaleTimeline(tmp_path), Set()],
        verbose=0,
    )
    # Seen with the next event, the growth from 2 to 4.
    assert moves(tmp_path)[1:] == [(4, 0, "set", 4.0)]


def test_several_optimizers_are_told_apart(tmp_path):
    timeline = ScaleTimeline(tmp_path)
    timeline.on_train_begin()
    timeline.on_scale_event(ScaleEvent(1, 0, "generator", 2.0, "growth"))
    (line,) = lines(tmp_path)
    assert line["optimizer"] == "generator"


def test_a_file_of_another_tool_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "scale.jsonl"
    path.write_text("no JSON\n")
    with pytest.raises(tfamp.InputError, match=r"scale\.jsonl is not a log"):
        ScaleTimeline(tmp_path)
    assert path.read_text() == "no JSON\n"
