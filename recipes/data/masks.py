"""Images with a label for every pixel, from TensorFlow Datasets by name."""

import tensorflow as tf
import tensorflow_datasets as tfds

from recipes.data import images, loading
from tfamp.errors import INPUT_ERROR_MARK, InputError

# What the stored masks hold, where it is known: the first label, the number.
_LABELS = {"oxford_iiit_pet": (1, 3)}

_IMAGE, _MASK = "image", "segmentation_mask"


class Masks:
    """A prepared data set of images and masks.

    Args:
      name: a TensorFlow Datasets name with the features `image` and
        `segmentation_mask`, such as "oxford_iiit_pet".
      data_dir: folder of prepared data sets; "" is the default of tfds.
      eval_split: split to evaluate on; "auto" as for `loading.load`.
      num_classes: labels in a mask, from 0; 0 where the data set is known.

    Raises:
      InputError: as `loading.load`, and where there are no masks or the
        number of classes is unknown.
    """

    def __init__(
        self, name: str, data_dir: str, eval_split: str, num_classes: int
    ):
        self._builder = loading.prepare(name, data_dir)
        features = dict(self._builder.info.features.items())
        for key in (_IMAGE, _MASK):
            if not isinstance(features.get(key), tfds.features.Image):
                raise InputError(
                    f"Data set {name!r} has no image {key!r}; it has "
                    f"{', '.join(features)}. Segmentation needs {_IMAGE!r} "
                    f"and {_MASK!r}, as in 'oxford_iiit_pet'."
                )
        known = _LABELS.get(name.partition(":")[0].partition("/")[0])
        self._first_label, self.num_classes = known or (0, num_classes)
        if self.num_classes < 2:
            raise InputError(
                f"num_classes={num_classes} of data set {name!r}; say how "
                "many labels its masks have, from 0: --num_classes=21."
            )
        self.channels = features[_IMAGE].shape[-1]
        self.train_split = "train"
        self.eval_split = loading.choose_splits(
            name, self._builder, self.train_split, eval_split
        )

    def num_examples(self, split: str) -> int:
        """How many images `split` holds."""
        return self._builder.info.splits[split].num_examples

    def read(
        self, split: str, size: int, seed: int | None = None
    ) -> tf.data.Dataset:
        """Reads pairs of an image and its labels, cut to a square.

        Args:
          split: the name of a split.
          size: side of the result in pixels.
          seed: shuffles the order of files; None keeps it.

        Returns:
          Images [size, size, C], float32 within 0..1, and labels
          [size, size], int32 from 0 to num_classes - 1.
        """
        dataset = self._builder.as_dataset(
            split=split,
            shuffle_files=seed is not None,
            read_config=tfds.ReadConfig(shuffle_seed=seed, try_autocache=False),
        )

        def prepare(example):
            image = tf.image.convert_image_dtype(example[_IMAGE], tf.float32)
            labels = tf.cast(example[_MASK], tf.int32) - self._first_label
            with tf.control_dependencies([self._check(labels)]):
                labels = _resize_labels(labels, size)
            return images.resize(image, size), labels

        return dataset.map(prepare, tf.data.AUTOTUNE, deterministic=True)

    def _check(self, labels: tf.Tensor) -> tf.Operation:
        low = self._first_label
        return tf.debugging.Assert(
            tf.reduce_all((labels >= 0) & (labels < self.num_classes)),
            [
                tf.strings.format(
                    INPUT_ERROR_MARK + "a mask holds labels {} to {}; the "
                    f"model has {self.num_classes} classes, so they must be "
                    f"{low} to {low + self.num_classes - 1}.",
                    (
                        tf.reduce_min(labels) + low,
                        tf.reduce_max(labels) + low,
                    ),
                )
            ],
        )


def _resize_labels(labels: tf.Tensor, size: int) -> tf.Tensor:
    """The central square of [H, W, 1], by nearest neighbours: [size, size]."""
    shape = tf.shape(labels)
    side = tf.reduce_min(shape[:2])
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    square = labels[top : top + side, left : left + side]
    square = tf.image.resize(square, [size, size], method="nearest")
    return tf.ensure_shape(square, [size, size, 1])[..., 0]
