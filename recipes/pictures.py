"""Pictures of what was learned, as PNG files."""

import os
import pathlib

import numpy as np
import tensorflow as tf

from tfamp.errors import InputError

# Pixels a side that a sample has at the least, where it is shown.
_SAMPLE_SIDE = 32


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Lays images out in rows, with gray gaps between.

    Args:
      images: [N, H, W, C], uint8.
      columns: images in a row; the last row may be shorter.
      gap: pixels between two images.

    Returns:
      One image, [rows * H + ..., columns * W + ..., C], uint8.
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full(
        [
            rows * (height + gap) - gap,
            columns * (width + gap) - gap,
            channels,
        ],
        128,
        np.uint8,
    )
    for i, image in enumerate(images):
        top = (i // columns) * (height + gap)
        left = (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def to_uint8(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Floats from `low` to `high` as gray levels 0 to 255, others clipped."""
    levels = (np.asarray(pixels, np.float32) - low) * (255 / (high - low))
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


def write_png(
    path: str | os.PathLike, image: np.ndarray, enlarge: int = 1
) -> None:
    """Writes an image [H, W, C], uint8, each pixel as `enlarge` squared.

    Raises:
      InputError: the file cannot be written.
    """
    image = image.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    encoded = tf.io.encode_png(image).numpy()
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}."
        ) from None


def write_samples(
    path: str | os.PathLike, samples: np.ndarray, columns: int
) -> None:
    """Writes made images [N, H, W, C], from -1 to 1, as one, small ones larger.

    Raises:
      InputError: the file cannot be written.
    """
    enlarge = max(_SAMPLE_SIDE // samples.shape[1], 1)
    write_png(path, grid(to_uint8(samples, -1, 1), columns), enlarge)


def label_colors(labels: np.ndarray) -> np.ndarray:
    """Gives labels colours: 0 is black, and the others go round the hues.

    Args:
      labels: [N, H, W], integers from 0.

    Returns:
      [N, H, W, 3], uint8.
    """
    labels = np.asarray(labels)
    # Neighbouring labels get hues a golden angle apart.
    hues = (labels * 0.381966) % 1.0
    values = np.where(labels == 0, 0.0, 1.0)
    hsv = np.stack([hues, np.full_like(hues, 0.7), values], axis=-1)
    return to_uint8(tf.image.hsv_to_rgb(hsv.astype(np.float32)), 0, 1)
