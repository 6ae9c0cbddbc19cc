"""Text data sets by name: the embedded one and any of tfds."""

import dataclasses

import tensorflow as tf
import tensorflow_datasets as tfds

from recipes.data import loading
from tfamp.errors import InputError


@dataclasses.dataclass(frozen=True)
class TextData:
    """A prepared data set of texts, some with labels.

    Attributes:
      name: as it was asked for.
      builder: the prepared tfds builder.
      text_keys: names of the features that hold text, in their order.
      label_key: name of the class label; None without one.
      num_classes: labels are integers from 0 to num_classes - 1; 0 without.
      train_split, eval_split: names of the splits.
    """

    name: str
    builder: tfds.core.DatasetBuilder
    text_keys: tuple[str, ...]
    label_key: str | None
    num_classes: int
    train_split: str
    eval_split: str

    def num_examples(self, split: str) -> int:
        """How many examples `split` holds."""
        return self.builder.info.splits[split].num_examples

    def num_bytes(self, split: str) -> int:
        """How large `split` is as it is stored."""
        return self.builder.info.splits[split].num_bytes

    def read(self, split: str, seed: int | None = None) -> tf.data.Dataset:
        """Reads the texts: string scalars, in UTF-8.

        Several texts of one example, such as premise and hypothesis, come as
        one, with a line feed between them.

        Args:
          split: the name of a split.
          seed: shuffles the order of files; None keeps it. The order of the
            examples depends on nothing else.
        """
        return self._examples(split, seed).map(self._text_of)

    def read_labelled(
        self, split: str, seed: int | None = None
    ) -> tf.data.Dataset:
        """Reads pairs of the texts of an example and its label, an int64.

        The texts, strings [K], stay apart: premise and hypothesis are two.

        Raises:
          InputError: the data set has no labels.
        """
        if self.label_key is None:
            raise InputError(
                f"Data set {self.name!r} has no class label; its features are "
                f"{_listed(self.builder.info.features)}."
            )
        return self._examples(split, seed).map(
            lambda example: (self._texts_of(example), example[self.label_key])
        )

    def _examples(self, split, seed):
        return self.builder.as_dataset(
            split=split,
            shuffle_files=seed is not None,
            read_config=tfds.ReadConfig(
                shuffle_seed=seed,
                # Caching is the pipeline's business.
                try_autocache=False,
            ),
        )

    def _texts_of(self, example):
        return tf.stack([example[key] for key in self.text_keys])

    def _text_of(self, example):
        return tf.strings.reduce_join(self._texts_of(example), separator="\n")


def load(
    name: str,
    data_dir: str = "",
    train_split: str = "train",
    eval_split: str = "auto",
) -> TextData:
    """Prepares a data set of texts, downloading what it needs.

    Args:
      name: "topics", or any TensorFlow Datasets name, also with config and
        version ("tiny_shakespeare", "wiki40b/en", "lm1b", "imdb_reviews",
        "glue/sst2").
      data_dir: folder of prepared data sets; "" is the default of tfds.
      train_split: split to train on.
      eval_split: split to evaluate on; "auto" prefers validation to test.

    Raises:
      InputError: the name is unknown, the data set cannot be prepared here,
        it has no text, or it lacks a split or the examples in one.
    """
    builder = loading.prepare(name, data_dir)
    features = builder.info.features
    text_keys = _text_keys(features)
    if not text_keys:
        raise InputError(
            f"Data set {name!r} has no text; its features are "
            f"{_listed(features)}."
        )
    label_key = next(
        (
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.ClassLabel)
        ),
        None,
    )
    eval_split = loading.choose_splits(name, builder, train_split, eval_split)
    for split in (train_split, eval_split):
        if not builder.info.splits[split].num_examples:
            raise InputError(
                f"Split {split!r} of data set {name!r} is empty; prepare it "
                "anew, or choose another split."
            )
    return TextData(
        name=name,
        builder=builder,
        text_keys=text_keys,
        label_key=label_key,
        num_classes=features[label_key].num_classes if label_key else 0,
        train_split=train_split,
        eval_split=eval_split,
    )


def count_bytes(texts: tf.data.Dataset) -> int:
    """How many bytes of UTF-8 the texts have, together."""
    lengths = texts.map(lambda each: tf.strings.length(each, "BYTE"))
    return int(
        lengths.reduce(
            tf.constant(0, tf.int64),
            lambda total, length: total + tf.cast(length, tf.int64),
        )
    )


def _text_keys(features) -> tuple[str, ...]:
    if not isinstance(features, tfds.features.FeaturesDict):
        return ()
    keys = tuple(
        key
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Text)
    )
    # Where one is called so, the others are names and numbers of it.
    return ("text",) if "text" in keys else keys


def _listed(names) -> str:
    return ", ".join(map(repr, names))
