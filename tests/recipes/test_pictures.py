import numpy as np
import pytest
import tensorflow as tf

import tfamp
from recipes import pictures


def test_a_grid_has_gray_gaps_and_a_short_last_row():
    images = np.zeros([3, 2, 1, 1], np.uint8)
    sheet = pictures.grid(images, columns=2, gap=1)[..., 0]
    np.testing.assert_array_equal(
        sheet,
        [[0, 128, 0], [0, 128, 0], [128] * 3, [0, 128, 128], [0, 128, 128]],
    )


def test_floats_become_gray_levels_and_are_clipped():
    levels = pictures.to_uint8(np.array([-2.0, -1, 0, 1, 3]), -1, 1)
    np.testing.assert_array_equal(levels, [0, 0, 128, 255, 255])


def test_the_file_is_a_png_of_enlarged_pixels(tmp_path):
    path = tmp_path / "new" / "a.png"
    pictures.write_png(path, np.array([[[7], [9]]], np.uint8), enlarge=2)
    read = tf.io.decode_png(path.read_bytes())[..., 0]
    np.testing.assert_array_equal(read, [[7, 7, 9, 9]] * 2)


def test_a_place_that_cannot_be_written_is_named():
    image = np.zeros([1, 1, 1], np.uint8)
    with pytest.raises(tfamp.InputError, match="/dev/null"):
        pictures.write_png("/dev/null/a.png", image)


def test_labels_have_colors_of_their_own_and_0_is_black():
    colors = pictures.label_colors(np.arange(11).reshape(1, 1, 11))
    assert not colors[0, 0, 0].any()
    assert len({tuple(color) for color in colors[0, 0]}) == 11
