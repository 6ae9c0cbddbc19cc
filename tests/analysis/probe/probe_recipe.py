"""A recipe to probe: a network of one hidden layer on random numbers."""

import dataclasses
import sys

import keras
import tensorflow as tf

import tfamp
from tfamp.recipe import flag
from tfamp.recipe.subject import open_subject


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag("normal", "normally distributed numbers")
    batch_size: int = flag(16, "examples in a step", minimum=1)


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Numbers, and their sums."""
    rows = tf.random.stateless_normal([4 * config.batch_size, 8], [0, 1])
    data = tf.data.Dataset.from_tensor_slices(
        (rows, tf.reduce_sum(rows, axis=1, keepdims=True))
    )
    data = data.batch(config.batch_size, drop_remainder=True)
    return data, data


def build_model(config: Config) -> keras.Model:
    """8 inputs, 16 hidden units, one output in float32."""
    model = keras.Sequential(
        [
            keras.Input([8]),
            keras.layers.Dense(16, "relu", name="hidden"),
            keras.layers.Dense(1, name="sum"),
        ]
    )
    tfamp.keep_float32(model)
    model.compile(
        optimizer=tfamp.wrap_optimizer(keras.optimizers.SGD(0.01)),
        loss="mse",
        auto_scale_loss=False,
    )
    return model


def train(config: Config) -> dict[str, float]:
    """Trains for an epoch."""
    subject = open_subject(sys.modules[__name__], config)
    model = subject.model
    tfamp.recipe.fit(model, subject.train_batches, None, config)
    return tfamp.recipe.final_metrics(model, subject.eval_batches)
