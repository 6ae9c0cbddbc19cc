"""From stored images to batches for a model: checks, sizes, augmentation.

Every random choice is a function of a seed that travels with the data, so a
pipeline repeats itself whatever the number of threads.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from tfamp.errors import INPUT_ERROR_MARK


class Augmentation(NamedTuple):
    """How far `augment` may change an image.

    shift: largest translation, as a share of the image's side.
    degrees: largest rotation, either way.
    zoom: largest relative change of size, either way.
    flip: whether half of the images are mirrored left to right.
    """

    shift: float = 0.0
    degrees: float = 0.0
    zoom: float = 0.0
    flip: bool = False


def check_example(
    image: tf.Tensor, label: tf.Tensor, num_classes: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Stops at a label or pixel that no model can learn from.

    Args:
      image: [H, W, C], of any dtype.
      label: integer scalar.
      num_classes: labels go from 0 to num_classes - 1.

    Returns:
      The image in float32, its integer dtype's range mapped to 0..1, and the
      label.

    Raises:
      tf.errors.InvalidArgumentError: a label out of range, or a float image
        with NaN or infinite pixels, as the pipeline runs.
    """
    checks = [
        tf.debugging.Assert(
            (label >= 0) & (label < num_classes),
            [
                tf.strings.format(
                    INPUT_ERROR_MARK
                    + "label {} is out of range; the model has "
                    f"{num_classes} classes, so labels must be 0 to "
                    f"{num_classes - 1}.",
                    label,
                )
            ],
        )
    ]
    if image.dtype.is_floating:
        bad_pixels = tf.math.count_nonzero(~tf.math.is_finite(image))
        checks.append(
            tf.debugging.Assert(
                bad_pixels == 0,
                [
                    tf.strings.format(
                        INPUT_ERROR_MARK
                        + "an image with label {} has {} pixels "
                        "that are NaN or infinite; remove or repair it.",
                        (label, bad_pixels),
                    )
                ],
            )
        )
    with tf.control_dependencies(checks):
        return tf.image.convert_image_dtype(image, tf.float32), label


def resize(image: tf.Tensor, size: int, rim: float = 0.0) -> tf.Tensor:
    """The central square of `image`, [H, W, C] float32, as [size, size, C].

    Args:
      image: pixels within 0..1.
      size: side of the result in pixels. An image that has it already passes
        unchanged.
      rim: share of the square's side that is cut off first.
    """
    if image.shape[:2] == (size, size):
        return image
    shape = tf.shape(image)
    side = tf.cast(tf.reduce_min(shape[:2]), tf.float32) * (1.0 - rim)
    side = tf.maximum(tf.cast(side, tf.int32), 1)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    image = image[top : top + side, left : left + side]
    image = tf.image.resize(image, [size, size], antialias=True)
    return tf.clip_by_value(image, 0.0, 1.0)


def random_resized_crop(
    image: tf.Tensor, size: int, seed: tf.Tensor
) -> tf.Tensor:
    """A random part of `image`, [H, W, C] float32, as [size, size, C].

    8% to 100% of the area at aspect ratios of 3:4 to 4:3 (Szegedy et al.,
    "Going Deeper with Convolutions", 2015).

    Args:
      image: pixels within 0..1.
      size: side of the result in pixels.
      seed: two int64s.
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        bounding_boxes=tf.zeros([1, 0, 4]),
        seed=seed,
        area_range=(0.08, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        min_object_covered=0.0,
        use_image_if_no_bounding_boxes=True,
    )
    channels = image.shape[-1]
    image = tf.slice(image, begin, extent)
    image = tf.image.resize(image, [size, size], antialias=True)
    image.set_shape([size, size, channels])
    return tf.clip_by_value(image, 0.0, 1.0)


def augment(
    images: tf.Tensor, seed: tf.Tensor, amount: Augmentation
) -> tf.Tensor:
    """Moves, turns, sizes and mirrors each image of a batch by chance.

    Args:
      images: [N, S, S, C], float32. Where nothing of an image is left, the
        result is 0.
      seed: two int64s.
      amount: the bounds within which the choices are uniform.

    Returns:
      Images of the same shape and dtype.
    """
    return augmented(images, chances(seed, tf.shape(images)[0]), amount)


def chances(seed: tf.Tensor, count) -> tf.Tensor:
    """What `augmented` makes choices of, for so many images: [count, 5]."""
    return tf.transpose(tf.random.stateless_uniform([5, count], seed))


def augmented(
    images: tf.Tensor, chance: tf.Tensor, amount: Augmentation
) -> tf.Tensor:
    """`augment`, with the numbers drawn: each image has its own.

    Args:
      images: [N, S, S, C], float32.
      chance: [N, 5] within 0..1.
      amount: the bounds within which the choices are uniform.
    """
    if amount == Augmentation():
        return images
    size = images.shape[1]
    # One row per choice.
    chance = tf.transpose(chance)
    spread = 2.0 * chance - 1.0
    shift_x = tf.round(spread[0] * amount.shift * size)
    shift_y = tf.round(spread[1] * amount.shift * size)
    angle = spread[2] * (amount.degrees * math.pi / 180.0)
    zoom = 1.0 + spread[3] * amount.zoom
    mirror = tf.where(chance[4] < 0.5, -1.0, 1.0)
    if not amount.flip:
        mirror = tf.ones_like(mirror)

    # The transform asks for the place in the input of each output pixel:
    # in = center + M (out - center - shift), with M = rotation / zoom.
    cos, sin = tf.cos(angle) / zoom, tf.sin(angle) / zoom
    xx, xy = cos * mirror, -sin
    yx, yy = sin * mirror, cos
    center = (size - 1) / 2
    from_x, from_y = center + shift_x, center + shift_y
    return resampled(
        images,
        (xx, xy, center - xx * from_x - xy * from_y),
        (yx, yy, center - yx * from_x - yy * from_y),
        size,
    )


def resampled(images, to_x, to_y, size: int) -> tf.Tensor:
    """Square images [N, size, size, C], each pixel from a place in its input.

    Args:
        images: [N, H, W, C].
        to_x: by how much the column there grows with the column and the row
            of the output, and where it begins: three of [N].
        to_y: the same of the row there.
        size: pixels a side.
    """
    zero = tf.zeros_like(to_x[2])
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([*to_x, *to_y, zero, zero], axis=1),
        output_shape=[size, size],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )


def with_seeds(dataset: tf.data.Dataset, seed: int) -> tf.data.Dataset:
    """Gives each element a seed of its own, another one in each epoch.

    Returns:
      A dataset of (element, two int64s).
    """
    return tf.data.Dataset.zip(dataset, _seeds(seed))


def with_chances(
    dataset: tf.data.Dataset, seed: int, batch_size: int
) -> tf.data.Dataset:
    """Gives each element what `augmented` makes choices of.

    They are those of `augment` for batches of that size with `with_seeds`.

    Returns:
      A dataset of (element, [5]).
    """
    drawn = _seeds(seed).map(lambda pair: chances(pair, batch_size)).unbatch()
    endless = tf.data.experimental.assert_cardinality(
        tf.data.INFINITE_CARDINALITY
    )
    return tf.data.Dataset.zip(dataset, drawn.apply(endless))


def _seeds(seed: int) -> tf.data.Dataset:
    numbers = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)
    return numbers.batch(2, drop_remainder=True)
