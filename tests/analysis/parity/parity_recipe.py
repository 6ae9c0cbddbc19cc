"""A recipe of a second: right, or wrong on purpose as `--behave` says.

*   `well`: mixed precision as it should be.
*   `same`: computes in float32 whatever it is told.
*   `unscaled`: gradients that are too small for float16, not scaled.
*   `16_bit_weights`: keeps no float32 weights; they lose the small updates.
*   `overflow`: inputs beyond float16.
*   `nan`: weights that overflow in 16 bits once training is over.
"""

import dataclasses
import sys
from typing import Literal

import keras
import numpy as np
import tensorflow as tf

import tfamp
from tfamp.recipe import flag
from tfamp.recipe.subject import open_subject

# Smaller than float16's smallest number, as a factor of a gradient near 1.
_TINY = 2.0**-30
# Updates of about 3e-4 are less than half of the spacing around 1.5: 2**-10 in
# float16, 2**-7 in bfloat16.
_SMALL_RATE, _WEIGHT = 6e-4, -1.5


@dataclasses.dataclass(frozen=True)
class Config(tfamp.recipe.RunConfig):
    """The flags of this recipe."""

    dataset: str = flag("clouds", "two clouds of points")
    epochs: int = flag(2, "passes over the training data", minimum=1)
    repeats: int = flag(1, "how often a pass has each point", minimum=1)
    behave: Literal[
        "well",
        "same",
        "unscaled",
        "16_bit_weights",
        "overflow",
        "nan",
    ] = flag("well", "see above")


def make_datasets(config: Config) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """Points, and 1 for those of the cloud in the upper right."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, [1024, 1])
    points = rng.normal(labels - 0.5, 0.5, [1024, 2])
    if config.behave == "overflow":
        points *= 1e6
    data = tf.data.Dataset.from_tensor_slices((points.astype("f4"), labels))
    train = data.take(768).shuffle(768, config.seed).repeat(config.repeats)
    evaluation = data.skip(768).batch(config.batch_size)
    return train.batch(config.batch_size), evaluation


def build_model(config: Config) -> keras.Model:
    """A linear classifier with one logit."""
    dtype, rate, initializer, factor = None, 0.5, "glorot_uniform", None
    if config.behave == "same":
        dtype = "float32"
    elif config.behave == "16_bit_weights":
        dtype = keras.config.dtype_policy().compute_dtype
        rate = _SMALL_RATE
        initializer = keras.initializers.Constant(_WEIGHT)
    elif config.behave == "unscaled":
        rate, factor = 0.5 / _TINY, _TINY
    layer = keras.layers.Dense(1, kernel_initializer=initializer, dtype=dtype)
    # A head would multiply in float32: what follows it is one.
    head = keras.layers.Activation("linear", dtype="float32")
    model = keras.Sequential([keras.Input([2], dtype="float32"), layer, head])
    options = {}
    if config.behave == "unscaled":
        options = {"dynamic": False, "initial_scale": 1.0}
    model.compile(
        optimizer=tfamp.wrap_optimizer(keras.optimizers.SGD(rate), **options),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        loss_weights=factor,
        metrics=[keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)],
        auto_scale_loss=False,
    )
    return model


def train(config: Config) -> dict[str, float]:
    """Trains, misbehaves, evaluates."""
    subject = open_subject(sys.modules[__name__], config)
    model = subject.model
    tfamp.recipe.fit(model, subject.train_batches, None, config)
    if config.behave == "nan":
        model.set_weights([1e6 * weight for weight in model.get_weights()])
    return tfamp.recipe.final_metrics(model, subject.eval_batches)


if __name__ == "__main__":
    tfamp.recipe.main(train, Config)
