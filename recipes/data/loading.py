"""Image-classification data sets by name: embedded ones and any of tfds."""

import contextlib
import dataclasses
import difflib
import io
import os
import random
from collections.abc import Callable, Iterable, Iterator

import requests
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from recipes.data import digits, topics
from tfamp.errors import InputError

# Data sets that need no download: prepared from an installed package.
EMBEDDED = {"digits": digits.Digits, "topics": topics.Topics}

# Splits to evaluate on, in the order of preference. `test` comes second: where
# both exist, the labels of `test` are often withheld.
EVAL_SPLITS = ("validation", "test")

_CONNECT_TIMEOUT_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A prepared data set of labelled images.

    Attributes:
      builder: the prepared tfds builder.
      image_key, label_key: names of the two features in an example.
      image_shape: (height, width, channels); None where it varies.
      num_classes: labels are integers from 0 to num_classes - 1.
      train_split, eval_split: names of the splits.
    """

    builder: tfds.core.DatasetBuilder
    image_key: str
    label_key: str
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

        Images stay encoded, so that shuffling and caching cost little memory;
        `decode` makes pixels of them.

        Args:
          split: the name of a split.
          seed: shuffles the order of files; None keeps it. The order of the
            examples depends on nothing else.
        """
        with _only_errors_logged():
            dataset = self.builder.as_dataset(
                split=split,
                shuffle_files=seed is not None,
                decoders=tfds.decode.PartialDecoding(
                    {self.image_key: True, self.label_key: True},
                    {self.image_key: tfds.decode.SkipDecoding()},
                ),
                read_config=tfds.ReadConfig(
                    shuffle_seed=seed,
                    # Caching is the pipeline's business.
                    try_autocache=False,
                ),
            )
        return dataset.map(lambda e: (e[self.image_key], e[self.label_key]))

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
) -> ImageData:
    """Prepares a data set of labelled images, downloading what it needs.

    Quick when the data set is prepared already. Several processes may prepare
    one data set into one folder at the same time.

    Args:
      name: a key of `EMBEDDED`, or any TensorFlow Datasets name, also with
        config and version ("cifar10", "lsun/bedroom", "mnist:3.0.1").
      data_dir: folder of prepared data sets; "" is the default of tfds.
      train_split: split to train on.
      eval_split: split to evaluate on; "auto" takes the first of
        `EVAL_SPLITS` that exists.

    Raises:
      InputError: the name is unknown, the data set cannot be prepared here,
        it has no images with class labels, or it lacks a split.
    """
    builder = prepare(name, data_dir)
    image_key, label_key = _feature_keys(name, builder.info)
    eval_split = choose_splits(name, builder, train_split, eval_split)
    features = builder.info.features
    return ImageData(
        builder=builder,
        image_key=image_key,
        label_key=label_key,
        image_shape=tuple(features[image_key].shape),
        num_classes=features[label_key].num_classes,
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
        raise InputError(f"Data set {name!r}: {_one_line(error)}") from error
    if os.path.exists(builder.data_dir):
        return builder
    tfds.display_progress_bar(enable=True)
    _check_manual_files(name, builder)
    _check_network(name, builder)
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
            f"{builder.data_dir}: {_one_line(error)} Point --data_dir to a "
            "writable folder or to one that holds a prepared copy."
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


def _check_manual_files(name: str, builder: tfds.core.DatasetBuilder) -> None:
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    folder = os.path.join(_downloads(builder), "manual")
    if not instructions or (os.path.isdir(folder) and os.listdir(folder)):
        return
    raise InputError(
        f"Data set {name!r} must be downloaded by hand; put the files into "
        f"{folder}: {_one_line(instructions)}"
    )


def _check_network(name: str, builder: tfds.core.DatasetBuilder) -> None:
    """Fails at once where tfds would retry an unreachable host for minutes."""
    if os.path.isdir(os.path.join(_downloads(builder), builder.name)):
        return  # What an earlier run downloaded may suffice.
    urls = [u for u in builder.url_infos or () if u.startswith("http")]
    if not urls:
        return
    try:
        requests.head(urls[0], timeout=_CONNECT_TIMEOUT_SECONDS)
    except requests.ConnectionError as error:
        raise InputError(
            f"Data set {name!r} cannot be downloaded here: no connection to "
            f"{urls[0]}. Point --data_dir to a folder that holds a prepared "
            f"copy, or use one that needs no download: {_listed(EMBEDDED)}."
        ) from error
    except requests.RequestException:
        return  # Slow or odd answers: tfds may still succeed.


def _downloads(builder: tfds.core.DatasetBuilder) -> str:
    return os.path.join(builder.data_dir_root, "downloads")


def _feature_keys(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
    features = dict(info.features.items())
    keys = info.supervised_keys or ("image", "label")
    if (
        len(keys) == 2
        and isinstance(features.get(keys[0]), tfds.features.Image)
        and isinstance(features.get(keys[1]), tfds.features.ClassLabel)
    ):
        return keys
    raise InputError(
        f"Data set {name!r} has no image with a class label; its features "
        f"are {_listed(features)}."
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _one_line(text: object) -> str:
    """The text on one line that ends as a sentence does."""
    line = " ".join(str(text).split())
    return line if line.endswith(".") else line + "."
