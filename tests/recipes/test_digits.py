import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn import datasets

from recipes.data import digits, loading


@pytest.fixture(scope="module")
def stored(digits_dir):
    """The examples of each split, as the builder stored them."""
    builder = loading.prepare("digits", digits_dir)
    splits = {}
    for split in ("train", "test"):
        examples = list(tfds.as_numpy(builder.as_dataset(split=split)))
        splits[split] = (
            np.stack([e["image"] for e in examples]),
            np.array([e["label"] for e in examples]),
        )
    return splits


def test_the_splits_hold_1437_and_360_uint8_images_of_8_by_8(stored):
    for split, count in (("train", 1437), ("test", 360)):
        images, labels = stored[split]
        assert images.shape == (count, 8, 8, 1)
        assert images.dtype == np.uint8
        assert labels.shape == (count,)


def test_train_and_test_together_are_the_digits_of_scikit_learn(stored):
    source = datasets.load_digits()
    images = np.concatenate([stored[s][0] for s in ("train", "test")])
    labels = np.concatenate([stored[s][1] for s in ("train", "test")])

    def rows(pixels, targets):
        pairs = np.column_stack([targets, pixels.reshape(len(targets), 64)])
        return pairs[np.lexsort(pairs.T)]

    np.testing.assert_array_equal(
        rows(images / digits.LEVEL_SCALE, labels),
        rows(source.images, source.target),
    )


def test_each_class_is_shared_out_four_to_one(stored):
    for label in range(10):
        train, test = (
            np.sum(stored[split][1] == label) for split in ("train", "test")
        )
        assert abs(test - (train + test) / 5) <= 1


def test_the_split_takes_every_fifth_example_of_the_sequence_by_class():
    # Sorted by class: indices 1 3 5 7 9 11 (class 0), 0 2 4 6 8 10 (class 1).
    train, test = digits.split_by_class(np.array([1, 0] * 6))
    np.testing.assert_array_equal(test, [1, 11, 8])
    np.testing.assert_array_equal(train, [3, 5, 7, 9, 0, 2, 4, 6, 10])
