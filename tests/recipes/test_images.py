import numpy as np
import pytest
import tensorflow as tf

from recipes.data import images
from recipes.data.images import Augmentation

SEED = tf.constant([1, 2], tf.int64)


def dot(row, column, size=9):
    """One black image with one white pixel."""
    image = np.zeros([1, size, size, 1], np.float32)
    image[0, row, column, 0] = 1.0
    return image


def draws(image, amount, count=64):
    """Many augmented copies of one image, [count, S, S, C]."""
    batch = tf.repeat(image, count, axis=0)
    return images.augment(batch, SEED, amount).numpy()


def test_no_augmentation_returns_the_images():
    image = dot(2, 3)
    np.testing.assert_array_equal(
        images.augment(image, SEED, Augmentation()), image
    )


def test_shifts_are_whole_pixels_up_to_the_bound_in_every_direction():
    # 9 pixels times 0.25 are 2.25: shifts of -2 to 2.
    shifted = draws(dot(4, 4), Augmentation(shift=0.25), 512)
    places = {tuple(np.argwhere(copy[..., 0] == 1.0)[0]) for copy in shifted}
    assert places == {(r, c) for r in range(2, 7) for c in range(2, 7)}
    np.testing.assert_array_equal(shifted.sum(axis=(1, 2, 3)), 1.0)


def test_a_flip_mirrors_left_to_right_and_nothing_else():
    flipped = draws(dot(2, 1), Augmentation(flip=True))
    places = {tuple(np.argwhere(copy[..., 0] == 1.0)[0]) for copy in flipped}
    assert places == {(2, 1), (2, 7)}


def test_rotation_keeps_the_center_and_stays_within_its_angle():
    turned = draws(dot(4, 4), Augmentation(degrees=30.0))
    np.testing.assert_allclose(turned[:, 4, 4, 0], 1.0, atol=1e-6)

    # A dot 4 pixels right of the center reaches 4 sin(30 degrees) = 2 rows.
    turned = draws(dot(4, 8), Augmentation(degrees=30.0))[..., 0]
    weight = turned.sum(axis=(1, 2))
    rows = (turned.sum(axis=2) * np.arange(9)).sum(axis=1) / weight - 4
    assert np.abs(rows).max() <= 2.2
    assert rows.min() < -1 < 1 < rows.max()


def test_zoom_changes_the_size_of_a_square_within_its_bound():
    square = np.zeros([1, 21, 21, 1], np.float32)
    square[0, 5:16, 5:16] = 1.0
    area = draws(square, Augmentation(zoom=0.2)).sum(axis=(1, 2, 3))
    sides = np.sqrt(area)
    assert 11 * 0.8 - 0.2 <= sides.min() < 10 < 12 < sides.max()
    assert sides.max() <= 11 * 1.2 + 0.2


def test_resize_takes_the_central_square():
    image = tf.concat(
        [tf.zeros([4, 2, 1]), tf.ones([4, 4, 1]), tf.zeros([4, 2, 1])], axis=1
    )
    np.testing.assert_array_equal(images.resize(image, 4), tf.ones([4, 4, 1]))
    np.testing.assert_array_equal(images.resize(image, 2), tf.ones([2, 2, 1]))


def test_resize_cuts_off_the_rim():
    # 25% of 8 pixels: one at each side.
    image = tf.pad(tf.ones([6, 6, 3]), [[1, 1], [1, 1], [0, 0]])
    resized = images.resize(image, 4, rim=0.25)
    np.testing.assert_array_equal(resized, tf.ones([4, 4, 3]))


def test_random_crops_are_parts_of_the_image_at_the_size_asked_for():
    # Brightness grows along the rows: a part spans less of it.
    ramp = tf.linspace(0.0, 1.0, 64)[:, None, None]
    image = tf.broadcast_to(ramp, [64, 48, 3])
    spans = []
    for seed in range(16):
        crop = images.random_resized_crop(image, 16, tf.constant([seed, 0]))
        assert crop.shape == (16, 16, 3)
        spans.append(float(tf.reduce_max(crop) - tf.reduce_min(crop)))
    assert min(spans) < 0.5 < max(spans) <= 1.0


def test_a_uint8_image_is_mapped_to_0_to_1_in_float32():
    image = tf.constant([[[0], [51], [255]]], tf.uint8)
    checked, label = images.check_example(image, tf.constant(3), 4)
    assert checked.dtype == tf.float32
    np.testing.assert_allclose(checked[0, :, 0], [0.0, 0.2, 1.0])
    assert label == 3


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_named(label):
    image = tf.zeros([2, 2, 1], tf.uint8)
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=rf"tfamp input: label {label} is out of range.* 0 to 3\.",
    ):
        images.check_example(image, tf.constant(label), 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_named_by_its_label(bad):
    image = tf.constant([[[0.5], [bad]]])
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match="tfamp input: an image with label 2 has 1 pixels",
    ):
        images.check_example(image, tf.constant(2), 4)


def test_seeds_differ_between_elements_and_epochs_and_repeat_with_the_seed():
    def epochs():
        tf.random.set_seed(0)
        seeded = images.with_seeds(tf.data.Dataset.range(3), seed=7)
        return [[tuple(seed.numpy()) for _, seed in seeded] for _ in range(2)]

    first = epochs()
    assert len({seed for epoch in first for seed in epoch}) == 6
    assert epochs() == first
