"""A training run that can be stopped anywhere, for tests of checkpoints.

Also a recipe, to be ended by signals in a process of its own.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

import tfamp
import tfamp.training.run
from recipes.data.images import with_seeds
from tfamp import keras_internals

ROWS, BATCH, STEPS = 48, 8, 6
TIMES = ("step_milliseconds", "examples_per_second")


class Stopped(Exception):
    """The run goes away here, as if its process had been killed."""


class StopAfter(keras.callbacks.Callback):
    """Ends a run after so many steps of this call, before that is saved.

    None ends nothing, and still has fit report, and so save, each step.
    """

    def __init__(self, steps):
        super().__init__()
        self.steps_left = steps

    def on_train_batch_end(self, batch, logs=None):
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left == 0:
                raise Stopped


def make_dataset():
    """Shuffled anew and changed at random in each epoch."""
    generator = np.random.default_rng(3)
    x = generator.normal(size=(ROWS, 4)).astype("float32")
    y = generator.integers(0, 3, ROWS)
    # One gradient beyond float16 an epoch: steps are skipped.
    x[7] = 3e4

    def jitter(row, seed):
        noise = tf.random.stateless_normal([4], seed)
        return row[0] + 0.1 * noise, row[1]

    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(16, seed=1)
    return with_seeds(dataset, seed=2).map(jitter).batch(BATCH)


def build_model(units=8, precision="mixed_float16", inner=None):
    """State of all kinds: moments, EMA, scale, statistics, seeds."""
    with tfamp.precision_scope(precision):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(units, activation="relu"),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.25),
                keras.layers.Dense(3, dtype="float32"),
            ]
        )
        inner = inner or keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                0.0, 100, warmup_target=0.05, warmup_steps=5
            ),
            use_ema=True,
            ema_overwrite_frequency=4,
        )
        model.compile(
            tfamp.wrap_optimizer(inner, dynamic_growth_steps=5),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            auto_scale_loss=False,
        )
        keras_internals.build_everything(model, make_dataset().element_spec)
    return model


def run(
    directory,
    *,
    epochs=3,
    stop_after=None,
    strategy=None,
    make_data=make_dataset,
    steps_per_epoch=None,
    validation_data=None,
    precision="mixed_float16",
    callbacks=(),
    seconds_between_saves=0,
):
    """What a process that has just started does; saves after each step.

    Args:
        directory: of the checkpoints; None saves nothing.
        epochs: of `STEPS` steps each.
        stop_after: steps of this call after which it goes away.
        strategy: None for one device.
        make_data: makes the dataset.
        steps_per_epoch: as for fit.
        validation_data: as for fit.
        precision: of the model.
        callbacks: as for fit.
        seconds_between_saves: within an epoch.

    Returns:
        The model and the history, without its times.
    """
    keras.utils.set_random_seed(0)
    strategy = strategy or tf.distribute.get_strategy()
    with strategy.scope():
        model = build_model(precision=precision)
    seconds = tfamp.training.run.SECONDS_BETWEEN_SAVES
    tfamp.training.run.SECONDS_BETWEEN_SAVES = seconds_between_saves
    try:
        with contextlib.suppress(Stopped):
            tfamp.fit(
                model,
                make_data(),
                epochs=epochs,
                steps_per_epoch=steps_per_epoch,
                validation_data=validation_data,
                callbacks=[StopAfter(stop_after), *callbacks],
                checkpoint_dir=directory,
                on_overflow="ignore",
                verbose=0,
            )
    finally:
        tfamp.training.run.SECONDS_BETWEEN_SAVES = seconds
    history = model.history.history
    return model, {k: v for k, v in history.items() if k not in TIMES}


def state_of(model):
    """All variables, each with its value on every replica."""
    strategy = model.distribute_strategy
    return [
        np.stack([local.numpy() for local in locals_])
        for variable in [*model.variables, *model.optimizer.variables]
        for locals_ in [strategy.experimental_local_results(variable.value)]
    ]


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of the recipe."""

    checkpoint_dir: str = ""
    weights: str = ""
    epochs: int = 8


def train(config):
    """Trains, and writes all variables to `config.weights`."""
    directory = config.checkpoint_dir or None
    model, history = run(directory, epochs=config.epochs)
    # Written whole or not at all.
    path = pathlib.Path(config.weights)
    np.savez(path.with_suffix(".part.npz"), *state_of(model))
    path.with_suffix(".part.npz").rename(path)
    return {"epochs": float(len(history.get("loss", ())))}


def program(flags, errors):
    """The recipe as a program, with its messages in the file `errors`."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, sys.stderr.fileno())
    sys.stderr = os.fdopen(file, "w", buffering=1)
    tf.config.experimental.enable_op_determinism()
    tfamp.recipe.main(train, Config, ["program", *flags])
