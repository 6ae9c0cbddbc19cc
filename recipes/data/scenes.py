"""Scenes of handwritten digits with a label for every pixel."""

import tensorflow as tf

from recipes.data import images
from recipes.data.glyphs import Glyphs

# Sides of a character in a scene, as shares of the scene's side.
_SMALLEST, _LARGEST = 0.2, 0.4

# A pixel belongs to a character from this much ink on.
_INK = 0.3

_NOISE = 0.3


def compose(
    glyphs: Glyphs, size: int, num_glyphs: int, count: int, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Scatters characters over noisy grounds; a later one covers others.

    Args:
      glyphs: the characters to choose from.
      size: side of a scene in pixels.
      num_glyphs: how many characters to place in each.
      count: how many scenes to make.
      seed: two integers, which all choices follow from.

    Returns:
      Scenes [count, size, size, 1], float32 within 0..1, and their labels
      [count, size, size], int32: 0 for the ground, 1 + label for a character.
    """
    seeds = tf.unstack(tf.random.split(seed, num_glyphs + 1))
    shape = [count, size, size]
    scenes = tf.random.stateless_uniform([*shape, 1], seeds[0], 0.0, _NOISE)
    labels = tf.zeros(shape, tf.int32)
    for place_seed in seeds[1:]:
        # One row per choice.
        choice = tf.random.stateless_uniform([5, count], place_seed)
        index = tf.cast(choice[0] * len(glyphs.labels), tf.int32)
        side = size * (_SMALLEST + choice[1] * (_LARGEST - _SMALLEST))
        top = choice[2] * (size - side)
        left = choice[3] * (size - side)
        ink = _place(tf.gather(glyphs.pixels, index), top, left, side, size)
        contrast = 0.5 + 0.5 * choice[4]
        marks = contrast[:, None, None, None] * ink
        scenes = tf.where(ink > _INK, tf.maximum(scenes, marks), scenes)
        own = 1 + tf.gather(glyphs.labels, index)[:, None, None]
        labels = tf.where(ink[..., 0] > _INK, own, labels)
    return scenes, labels


def _place(pixels, top, left, side, size: int) -> tf.Tensor:
    """Characters [N, H, W, 1] as squares of a `side` in [N, size, size, 1]."""
    height, width = pixels.shape[1:3]
    zero, zoom_x, zoom_y = tf.zeros_like(side), width / side, height / side
    # The place in the input of each output pixel; centers are at halves.
    return images.resampled(
        pixels,
        (zoom_x, zero, (0.5 - left) * zoom_x - 0.5),
        (zero, zoom_y, (0.5 - top) * zoom_y - 0.5),
        size,
    )
