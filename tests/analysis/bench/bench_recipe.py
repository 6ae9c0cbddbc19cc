"""A recipe to measure: a network of one hidden layer on ones.

`--behave` makes it unfit: `short` trains for one step, `alone` without
`tfamp.fit`, `exhausted` runs out of memory.
"""

import dataclasses
from typing import Literal

import keras
import tensorflow as tf

import tfamp
from tfamp.recipe import flag


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag("ones", "ones and zeros")
    batch_size: int = flag(8, "examples in a step", minimum=1)
    behave: Literal["well", "short", "alone", "exhausted"] = flag(
        "well", "see above"
    )


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Four times 16 ones, and a zero for each."""
    rows = (
        tf.ones([4 * config.batch_size, 16]),
        tf.zeros([4 * config.batch_size, 1]),
    )
    data = tf.data.Dataset.from_tensor_slices(rows)
    data = data.batch(config.batch_size, drop_remainder=True)
    return data, data


def build_model(config: Config) -> keras.Model:
    """16 inputs, 32 hidden units, one output."""
    model = keras.Sequential(
        [
            keras.Input([16]),
            keras.layers.Dense(32, "relu"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        optimizer=tfamp.wrap_optimizer(keras.optimizers.SGD(0.0)),
        loss="mse",
        auto_scale_loss=False,
    )
    return model


def train(config: Config) -> dict[str, float]:
    """Trains, or does not."""
    strategy = tfamp.recipe.start(config)
    train_batches, eval_batches = make_datasets(config)
    if config.behave == "alone":
        return {}
    if config.behave == "exhausted":
        raise tf.errors.ResourceExhaustedError(None, None, "no memory left")
    with strategy.scope():
        model = build_model(config)
    if config.behave == "short":
        tfamp.fit(model, train_batches, steps_per_epoch=1, verbose=0)
        return {}
    tfamp.recipe.fit(model, train_batches, None, config)
    return tfamp.recipe.final_metrics(model, eval_batches)
