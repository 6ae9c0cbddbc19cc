"""The handwritten digits that scikit-learn carries, as a tfds data set.

1,797 grayscale images of 8x8 pixels: the test part of "Optical Recognition of
Handwritten Digits" (Alpaydin and Kaynak, 1998, UCI Machine Learning
Repository). They come with the scikit-learn package, so nothing is downloaded.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

# The source stores 17 gray levels, 0 to 16. 15 is the largest whole factor
# that keeps them within uint8, so the scaling loses nothing.
LEVEL_SCALE = 15

# One image in five is a test image.
_TEST_STRIDE = 5


# Unregistered: the registry of tfds is global to the process, and a second
# import of this module must not fail on it.
class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of `digits`: uint8 images [8, 8, 1], labels 0 to 9.

    Splits: `train` with 1,437 and `test` with 360 examples, each class shared
    out four to one. Pixels are the source's gray levels times 15.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # The images are on this machine already.
        # Imported here because it takes a second that only the first run,
        # which prepares the data set, has to spend.
        from sklearn import datasets

        bunch = datasets.load_digits()
        images = (bunch.images * LEVEL_SCALE).astype(np.uint8)[..., np.newaxis]
        train, test = split_by_class(bunch.target)
        return {
            "train": self._generate_examples(images, bunch.target, train),
            "test": self._generate_examples(images, bunch.target, test),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for index in indices.tolist():
            yield index, {"image": images[index], "label": int(labels[index])}


def split_by_class(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares examples out to train and test, stratified, without chance.

    A rule instead of a random generator: the split is the same on every
    machine and with every version of NumPy.

    Args:
      labels: integers, [N].

    Returns:
      The indices of the train and of the test examples. Every fifth example
      of the sequence sorted by class (stable) is a test example.
    """
    by_class = np.argsort(labels, kind="stable")
    is_test = np.arange(len(labels)) % _TEST_STRIDE == 0
    return by_class[~is_test], by_class[is_test]
