"""Images as pixels, for models that make some: of any size, labelled or not."""

import dataclasses

import numpy as np
import tensorflow as tf

from recipes.data import images, loading
from tfamp.errors import InputError

# Larger images are made smaller unless the user says how large they shall be.
_LARGEST_SIDE = 64

# Data sets up to this size stay in memory, as compressed as they are stored.
_CACHED_BYTES = 2**30
_SHUFFLED_EXAMPLES = 16384

# Made images are compared with as many; more cost much and say little more.
_COMPARED_IMAGES = 2048


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Square images of one size, float32 from -1 to 1.

    Attributes:
      data: the data set as it is stored.
      image_size: pixels a side.
    """

    data: loading.ImageData
    image_size: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of an image: (height, width, channels)."""
        return self.image_size, self.image_size, self.data.image_shape[-1]

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart; 0 without labels."""
        return self.data.num_classes

    @property
    def num_train(self) -> int:
        """How many images there are to train on."""
        return self.data.num_examples(self.data.train_split)

    @property
    def num_eval(self) -> int:
        """How many images there are to evaluate on."""
        return self.data.num_examples(self.data.eval_split)

    def train_examples(self, seed: int) -> tf.data.Dataset:
        """Pairs of an image [S, S, C] and its label, int32, in random order.

        The order changes with each epoch and repeats with the seed.
        """
        examples = self._stored(self.data.train_split, seed)
        return self._decoded(examples.shuffle(_SHUFFLED_EXAMPLES, seed))

    def eval_examples(self) -> tf.data.Dataset:
        """Pairs as for training, of the other split and in one order."""
        return self._decoded(self._stored(self.data.eval_split, seed=None))

    def compared_images(self) -> tuple[np.ndarray, np.ndarray]:
        """As many images to train on as to evaluate on: [N, S, S, C] each."""
        count = min(_COMPARED_IMAGES, self.num_train, self.num_eval)
        return tuple(
            np.stack([image for image, _ in examples.as_numpy_iterator()])
            for examples in (
                self.train_examples(seed=0).take(count),
                self.eval_examples().take(count),
            )
        )

    def _stored(self, split, seed):
        examples = self.data.read(split, seed)
        fits = self.data.num_bytes(split) <= _CACHED_BYTES
        return examples.cache() if fits else examples

    def _decoded(self, examples):
        def decode(encoded, label):
            # Without labels all are 0, of a single class.
            image, label = images.check_example(
                self.data.decode(encoded), label, max(self.num_classes, 1)
            )
            image = images.resize(image, self.image_size)
            return 2.0 * image - 1.0, tf.cast(label, tf.int32)

        return examples.map(decode, tf.data.AUTOTUNE, deterministic=True)


def load(name: str, data_dir: str, image_size: int, batch_size: int) -> Pixels:
    """Prepares a data set of images.

    Args:
      name: "digits", or any TensorFlow Datasets name, such as "cifar10" or
        "celeb_a".
      data_dir: folder of prepared data sets; "" is the default of tfds.
      image_size: pixels a side, of the middle of each image; 0: as stored,
        and no more than 64.
      batch_size: that the training images have to fill.

    Raises:
      InputError: as `loading.load`, and for fewer images than a batch has, or
        than the two that a covariance needs.
    """
    data = loading.load(name, data_dir, needs_labels=False)
    for split in (data.train_split, data.eval_split):
        if data.num_examples(split) < 2:
            raise InputError(
                f"Split {split!r} of data set {name!r} has "
                f"{data.num_examples(split)} images; expected 2 or more."
            )
    num_train = data.num_examples(data.train_split)
    if batch_size > num_train:
        raise InputError(
            f"batch_size={batch_size} exceeds the {num_train} training "
            f"images of {name!r}; use {num_train} or less."
        )
    stored = _LARGEST_SIDE if data.sizes_vary else min(data.image_shape[:2])
    return Pixels(data, image_size or min(stored, _LARGEST_SIDE))
