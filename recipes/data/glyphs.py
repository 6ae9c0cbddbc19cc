"""Single characters in memory, to compose larger pictures from."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from recipes.data import loading
from tfamp.errors import InputError


class Glyphs(NamedTuple):
    """Characters of one size.

    pixels: [N, H, W, 1], float32 within 0..1, ink bright.
    labels: [N], int32, from 0 to num_classes - 1.
    num_classes: how many characters there are.
    """

    pixels: np.ndarray
    labels: np.ndarray
    num_classes: int


def read_glyphs(name: str, data_dir: str = "") -> tuple[Glyphs, Glyphs]:
    """The characters to train on and those to evaluate on.

    Args:
      name: "digits", or a TensorFlow Datasets name of grayscale images of one
        size, such as "mnist" or "emnist/balanced".
      data_dir: folder of prepared data sets; "" is the default of tfds.

    Raises:
      InputError: as `loading.load`, and for images that are in color or of
        several sizes.
    """
    data = loading.load(name, data_dir)
    if data.sizes_vary or data.image_shape[-1] != 1:
        raise InputError(
            f"Data set {name!r} has images of shape {data.image_shape}; "
            "expected grayscale ones of one size, as of digits or mnist."
        )
    return _read(data, data.train_split), _read(data, data.eval_split)


def _read(data: loading.ImageData, split: str) -> Glyphs:
    decoded = data.read(split).map(
        lambda encoded, label: (data.decode(encoded), label),
        tf.data.AUTOTUNE,
    )
    pixels, labels = zip(*decoded.as_numpy_iterator(), strict=True)
    pixels = np.stack(pixels)
    return Glyphs(
        # The digits of scikit-learn reach only 240 of 255.
        pixels.astype(np.float32) / pixels.max(),
        np.array(labels, np.int32),
        data.num_classes,
    )
