"""What the failures have in common: the digits, and how a failure is told."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from recipes.data import loading

NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Failure:
    """A mistake, and the model that it is made in.

    Attributes:
        title: the mistake in a few words.
        build_model: takes whether it is mended; returns the compiled model,
            in the precision of the global Keras policy.
        to_example: makes what the model takes of pixels, [8, 8] with the
            gray levels 0 to 255 in float32, and a label, an int64 scalar.
        curve: the name of the loss that shows the mistake.
        microbatches: pieces that `tfamp.fit` splits a batch of the mended
            model into.
    """

    title: str
    build_model: Callable[[bool], keras.Model]
    to_example: Callable[[tf.Tensor, tf.Tensor], tuple[Any, Any]]
    curve: str = "loss"
    microbatches: int = 1


def flat_pixels(pixels: tf.Tensor, label: tf.Tensor):
    """64 pixels between 0 and 1, and the label."""
    return tf.reshape(pixels, [64]) / 255.0, label


def make_batches(
    to_example: Callable[[tf.Tensor, tf.Tensor], tuple[Any, Any]],
    dataset: str,
    data_dir: str,
    batch_size: int,
    seed: int,
) -> tuple[tf.data.Dataset, tf.data.Dataset]:
    """The training and the test examples in batches.

    Args:
        to_example: as of `Failure`.
        dataset: grayscale images of one size, by name.
        data_dir: of tfds.
        batch_size: examples in a batch; a smaller last one is left out of the
            training data.
        seed: of the order of the training data.
    """
    data = loading.load(dataset, data_dir)

    def read(split):
        examples = data.read(split).map(
            lambda image, label: to_example(
                tf.cast(data.decode(image)[..., 0], tf.float32), label
            )
        )
        return examples.cache()

    train = read(data.train_split).shuffle(
        data.num_examples(data.train_split), seed
    )
    return (
        train.batch(batch_size, drop_remainder=True).prefetch(2),
        read(data.eval_split).batch(batch_size),
    )
