"""Data sets of images by name: embedded ones and any of tfds."""

import contextlib
import dataclasses
import difflib
import functools
import io
import os
import random
from collections.abc import Callable, Iterable, Iterator

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from recipes.data import digits, downloads, manuals, passages, topics
from tfamp.errors import InputError

# Data sets that need no download: prepared from an installed package.
EMBEDDED = {
    "digits": digits.Digits,
    "topics": topics.Topics,
    "passages": passages.Passages,
    "manuals/language": functools.partial(manuals.Manuals, config="language"),
    "manuals/library": functools.partial(manuals.Manuals, config="library"),
}

# Splits to evaluate on, in the order of preference. `test` comes second: where
# both exist, the labels of `test` are often withheld.
EVAL_SPLITS = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A prepared data set of images, with labels or without.

    Attributes:
      builder: the prepared tfds builder.
      image_key, label_key: names of the two features in an example; None for
        a label that there is not.
      image_shape: (height, width, channels); None where it varies.
      num_classes: labels are integers from 0 to num_classes - 1; 0 without
        labels.
      train_split, eval_split: names of the splits.
    """

    builder: tfds.core.DatasetBuilder
    image_key: str
    label_key: str | None
    image_shape: tuple[int | None, int | None, int]
    num_classes: int
    train_split: str
    eval_split: str

    @property
    def sizes_vary(self) -> bool:
        """Whether images differ in height or width."""
        return None in self.image_shape[:2]

    def num_examples(self, split: str) -> int:
        """How many examples `split` holds."""
        return self.builder.info.splits[split].num_examples

    def num_bytes(self, split: str) -> int:
        """How large `split` is as it is stored, compressed."""
        return self.builder.info.splits[split].num_bytes

    def read(self, split: str, seed: int | None = None) -> tf.data.Dataset:
        """Reads pairs of an encoded image and its label, an int64 scalar.

        Without labels it is 0.

        Images stay encoded, so that shuffling and caching cost little memory;
        `decode` makes pixels of them.

        Args:
          split: the name of a split.
          seed: shuffles the order of files; None keeps it. The order of the
            examples depends on nothing else.
        """
        keys = [k for k in (self.image_key, self.label_key) if k]
        with _only_errors_logged():
            dataset = self.builder.as_dataset(
                split=split,
                shuffle_files=seed is not None,
                decoders=tfds.decode.PartialDecoding(
                    dict.fromkeys(keys, True),
                    {self.image_key: tfds.decode.SkipDecoding()},
                ),
                read_config=tfds.ReadConfig(
                    shuffle_seed=seed,
                    # Caching is the pipeline's business.
                    try_autocache=False,
                ),
            )
        no_label = tf.constant(0, tf.int64)
        return dataset.map(
            lambda e: (e[self.image_key], e.get(self.label_key, no_label))
        )

    def decode(self, encoded: tf.Tensor) -> tf.Tensor:
        """The pixels, [H, W, C], in the dtype of the data set."""
        return self.builder.info.features[self.image_key].decode_example(
            encoded
        )


def load(
    name: str,
    data_dir: str = "",
    train_split: str = "train",
    eval_split: str = "auto",
    needs_labels: bool = True,
) -> ImageData:
    """Prepares a data set of images, downloading what it needs.

    Quick when the data set is prepared already. Several processes may prepare
    one data set into one folder at the same time.

    Args:
      name: a key of `EMBEDDED`, or any TensorFlow Datasets name, also with
        config and version ("cifar10", "lsun/bedroom", "mnist:3.0.1").
      data_dir: folder of prepared data sets; "" is the default of tfds.
      train_split: split to train on.
      eval_split: split to evaluate on; "auto" takes the first of
        `EVAL_SPLITS` that exists.
      needs_labels: whether images without class labels are an error.

    Raises:
      InputError: the name is unknown, the data set cannot be prepared here,
        it has no images, or none with class labels, or it lacks a split.
    """
    builder = prepare(name, data_dir)
    image_key, label_key = _feature_keys(name, builder.info, needs_labels)
    eval_split = choose_splits(name, builder, train_split, eval_split)
    features = builder.info.features
    return ImageData(
        builder=builder,
        image_key=image_key,
        label_key=label_key,
        image_shape=tuple(features[image_key].shape),
        num_classes=features[label_key].num_classes if label_key else 0,
        train_split=train_split,
        eval_split=eval_split,
    )


def prepare(name: str, data_dir: str = "") -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set that is ready to be read.

    Args and errors as for `load`, for data sets of any kind.
    """
    root = os.path.expanduser(data_dir) or None
    if name in EMBEDDED:
        # Preparing takes a second; what tfds prints about it tells nothing.
        with contextlib.redirect_stdout(io.StringIO()):
            tfds.disable_progress_bar()
            return _prepared(lambda: EMBEDDED[name](data_dir=root))

    _check_known(name, root)
    try:
        builder = tfds.builder(name, data_dir=root)
    except (ValueError, AssertionError) as error:
        # An unknown version or argument.
        raise InputError(
            f"Data set {name!r}: {downloads.one_line(error)}"
        ) from error
    if os.path.exists(builder.data_dir):
        return builder
    tfds.display_progress_bar(enable=True)
    downloads.check_can_be_had(name, builder)
    return _prepared(lambda: tfds.builder(name, data_dir=root))


def choose_splits(
    name: str,
    builder: tfds.core.DatasetBuilder,
    train_split: str = "train",
    eval_split: str = "auto",
) -> str:
    """The split to evaluate on; args and errors as for `load`."""
    splits = list(builder.info.splits)
    if eval_split == "auto":
        eval_split = next((s for s in EVAL_SPLITS if s in splits), "test")
    for split in (train_split, eval_split):
        if split not in splits:
            raise InputError(
                f"Data set {name!r} has no split {split!r}; it has "
                f"{_listed(splits)}."
            )
    return eval_split


def _prepared(
    make_builder: Callable[[], tfds.core.DatasetBuilder],
) -> tfds.core.DatasetBuilder:
    builder = make_builder()
    try:
        with _unseeded_random():
            builder.download_and_prepare()
    except Exception as error:
        # Another process may have finished first: tfds then cannot rename its
        # complete copy to the place that is taken. A builder made now reads
        # what the other has written.
        builder = make_builder()
        if os.path.exists(builder.data_dir):
            return builder
        raise InputError(
            f"Data set {builder.name!r} cannot be prepared in "
            f"{builder.data_dir}: {downloads.one_line(error)} "
            f"{downloads.advice(builder, error)}"
        ) from error
    return builder


@contextlib.contextmanager
def _only_errors_logged() -> Iterator[None]:
    """Hides that tfds warns of what it calls itself (partial decoding)."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _unseeded_random() -> Iterator[None]:
    """Lets tfds draw names of temporary folders that no other process draws.

    It draws them from Python's global generator. Two seeded processes would
    write into one folder.
    """
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


def _check_known(name: str, root: str | None) -> None:
    base, _, config = name.split(":")[0].partition("/")
    embedded = [n for n in EMBEDDED if n.partition("/")[0] == base]
    if embedded:
        raise InputError(
            f"Unknown data set {name!r}; expected {_listed(embedded)}."
        )
    known = tfds.list_builders(with_community_datasets=False)
    if base in known:
        configs = tfds.builder_cls(base).builder_configs
        if config and configs and config not in configs:
            raise InputError(
                f"Data set {base!r} has no config {config!r}; it has "
                f"{_listed(configs)}."
            )
        return
    # A folder may hold a prepared data set whose builder code is elsewhere.
    if base and root and os.path.isdir(os.path.join(root, base)):
        return
    near = difflib.get_close_matches(base, [*EMBEDDED, *known], n=5)
    hint = f"; did you mean {_listed(near)}?" if near else "."
    raise InputError(
        f"Unknown data set {name!r}{hint} Allowed: {_listed(EMBEDDED)} and "
        "the names of tfds.list_builders()."
    )


def _feature_keys(
    name: str, info: tfds.core.DatasetInfo, needs_labels: bool
) -> tuple[str, str | None]:
    features = dict(info.features.items())
    keys = info.supervised_keys or ("image", "label")
    if len(keys) == 2 and isinstance(
        features.get(keys[0]), tfds.features.Image
    ):
        if isinstance(features.get(keys[1]), tfds.features.ClassLabel):
            return keys
        if not needs_labels:
            return keys[0], None
    raise InputError(
        f"Data set {name!r} has no image"
        f"{' with a class label' if needs_labels else ''}; its features are "
        f"{_listed(features)}."
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
