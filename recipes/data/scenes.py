"""Scenes of handwritten digits with a label for every pixel."""

import tensorflow as tf

from recipes.data.glyphs import Glyphs

# Sides of a character in a scene, as shares of the scene's side.
_SMALLEST, _LARGEST = 0.2, 0.4

# A pixel belongs to a character from this much ink on.
_INK = 0.3

_NOISE = 0.3


def compose(
    glyphs: Glyphs, size: int, num_glyphs: int, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Scatters characters over a noisy ground; a later one covers others.

    Args:
      glyphs: the characters to choose from.
      size: side of the scene in pixels.
      num_glyphs: how many characters to place.
      seed: two int64s, which all choices follow from.

    Returns:
      The scene [size, size, 1], float32 within 0..1, and its labels
      [size, size], int32: 0 for the ground, 1 + label for a character.
    """
    seeds = tf.random.split(seed, num_glyphs + 1)
    scene = tf.random.stateless_uniform([size, size, 1], seeds[0], 0.0, _NOISE)
    labels = tf.zeros([size, size], tf.int32)
    for place_seed in tf.unstack(seeds[1:]):
        choice = tf.random.stateless_uniform([5], place_seed)
        index = tf.cast(choice[0] * len(glyphs.labels), tf.int32)
        side = _SMALLEST + choice[1] * (_LARGEST - _SMALLEST)
        side = tf.cast(side * size, tf.int32)
        free = tf.cast(size - side, tf.float32)
        top = tf.cast(choice[2] * free, tf.int32)
        left = tf.cast(choice[3] * free, tf.int32)
        contrast = 0.5 + 0.5 * choice[4]

        ink = tf.image.resize(tf.gather(glyphs.pixels, index), [side, side])
        ink = tf.image.pad_to_bounding_box(ink, top, left, size, size)
        ink = tf.ensure_shape(ink, [size, size, 1])
        is_ink = ink > _INK
        scene = tf.where(is_ink, tf.maximum(scene, contrast * ink), scene)
        label = 1 + tf.gather(glyphs.labels, index)
        labels = tf.where(is_ink[..., 0], label, labels)
    return scene, labels
