"""Lines of handwriting with their text, composed from single characters."""

from typing import NamedTuple

import tensorflow as tf

from recipes.data.glyphs import Glyphs

# Sides of a character, and the gap before it, as shares of the line's height.
# Its image has a rim, so that characters touch from a negative gap on.
_HEIGHTS = (0.6, 0.95)
_WIDTHS = (0.5, 0.9)
_GAPS = (-0.15, 0.4)

# Pixels to the right for each pixel up: of a whole line, which one hand
# writes, and of each character besides.
_LINE_SLANT, _CHARACTER_SLANT = 0.3, 0.1

_CONTRASTS = (0.5, 1.0)
_NOISE = 0.3


class LineShape(NamedTuple):
    """What all lines have in common.

    height, width: of the picture in pixels.
    max_characters: of a line's text, which has at least one.
    """

    height: int
    width: int
    max_characters: int


def fit_glyphs(glyphs: Glyphs, height: int) -> Glyphs:
    """The characters as squares of a line's height, as `compose` wants them.

    Done once, and with antialiasing, which composing does without.
    """
    pixels = tf.image.resize(glyphs.pixels, [height, height], antialias=True)
    pixels = tf.clip_by_value(pixels, 0.0, 1.0).numpy()
    return glyphs._replace(pixels=pixels)


def compose(
    glyphs: Glyphs, shape: LineShape, seeds: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Writes lines of 1 to `max_characters` random characters on noise.

    A line that would be wider than its picture is squeezed to fit.

    Args:
      glyphs: the characters to choose from, squares of the line's height.
      shape: of the lines.
      seeds: [B, 2], int64; each line follows from its own alone.

    Returns:
      Pictures [B, height, width, 1], float32 within 0..1, and their labels
      [B, max_characters], int32: 1 + label of each character, then 0.
    """
    of_characters, of_line, noise = _draw(shape, seeds)
    length = 1 + tf.cast(of_line[:, :1] * shape.max_characters, tf.int32)
    is_written = tf.range(shape.max_characters) < length  # [B, N]
    choice = tf.cast(of_characters[0] * len(glyphs.labels), tf.int32)

    transforms = _places(shape, is_written, of_characters, of_line)
    # [B * N, H, W, 1]: each character on a picture of its own.
    ink = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.gather(glyphs.pixels, tf.reshape(choice, [-1])),
        transforms=tf.reshape(transforms, [-1, 8]),
        output_shape=[shape.height, shape.width],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    ink = tf.reshape(ink, [-1, shape.max_characters, shape.height, shape.width])
    contrast = tf.where(
        is_written, _between(*_CONTRASTS, of_characters[1]), 0.0
    )
    ink = tf.reduce_max(ink * contrast[..., None, None], axis=1)
    pictures = tf.maximum(noise, ink)[..., None]
    labels = 1 + tf.gather(glyphs.labels, choice)
    return pictures, tf.where(is_written, labels, 0)


def _draw(shape, seeds):
    """Uniform numbers [7, B, N] of characters, [B, 3] of lines, and noise."""
    per_character = 7 * shape.max_characters
    count = per_character + 3 + shape.height * shape.width
    drawn = tf.map_fn(
        lambda seed: tf.random.stateless_uniform([count], seed),
        seeds,
        fn_output_signature=tf.TensorSpec([count], tf.float32),
    )
    of_characters, of_line, noise = tf.split(
        drawn, [per_character, 3, shape.height * shape.width], axis=1
    )
    of_characters = tf.reshape(of_characters, [-1, 7, shape.max_characters])
    noise = tf.reshape(noise, [-1, shape.height, shape.width])
    return tf.transpose(of_characters, [1, 0, 2]), of_line, _NOISE * noise


def _places(shape, is_written, of_characters, of_line):
    """From the place in the line to that in each glyph, [B, N, 8]."""
    _, _, height, width, gap, top, slant = tf.unstack(of_characters)
    size = float(shape.height)
    height = size * _between(*_HEIGHTS, height)
    width = size * _between(*_WIDTHS, width)
    gap = size * _between(*_GAPS, gap)
    top = top * (size - height)
    slant = _between(-1.0, 1.0, slant) * _CHARACTER_SLANT
    slant += _between(-1.0, 1.0, of_line[:, 1:2]) * _LINE_SLANT

    advance = tf.where(is_written, gap + width, 0.0)
    end = tf.cumsum(advance, axis=1)
    total = tf.reduce_max(end, axis=1, keepdims=True)
    squeeze = tf.minimum(shape.width / total, 1.0)
    margin = tf.maximum(shape.width - total, 0.0) * of_line[:, 2:3]
    center_x = margin + squeeze * (end - width / 2)
    center_y = top + height / 2

    # in = scale * (out - center) + glyph center, at the centers of pixels,
    # which lie half a pixel from their corners.
    scale_x, scale_y = size / (squeeze * width), size / height
    shear = scale_x * squeeze * slant
    middle = (size - 1) / 2
    out_x, out_y = center_x - 0.5, center_y - 0.5
    zero = tf.zeros_like(scale_x)
    return tf.stack(
        [
            scale_x,
            shear,
            middle - scale_x * out_x - shear * out_y,
            zero,
            scale_y,
            middle - scale_y * out_y,
            zero,
            zero,
        ],
        axis=-1,
    )


def _between(low, high, share):
    return low + (high - low) * share
