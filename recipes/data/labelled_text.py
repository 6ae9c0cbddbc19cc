"""Batches for a text classifier: tokens of one length, and their labels."""

import dataclasses
import functools

import numpy as np
import scipy.sparse
import tensorflow as tf
from sklearn.naive_bayes import MultinomialNB

from recipes.data import subwords, text, tokens
from recipes.data.masked_tokens import Masking
from tfamp.errors import InputError


@dataclasses.dataclass(frozen=True)
class Cut:
    """How texts become batches.

    Attributes:
      sequence_length: tokens of a text, with a separator behind each part.
      truncate: whether longer texts are cut, and not an error.
      batch_size: texts in a batch.
    """

    sequence_length: int
    truncate: bool
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Split:
    """Texts as tokens.

    Attributes:
      tokens: of all texts, one after the other, int32 [N].
      row_splits: where each text begins, and the last one ends, int64 [R + 1].
      labels: int32 [R].
    """

    tokens: np.ndarray
    row_splits: np.ndarray
    labels: np.ndarray

    def share(self, share: float) -> "Split":
        """Evenly spaced texts, so that they are that share of all."""
        places = np.arange(len(self.labels) + 1) * share
        rows = np.flatnonzero(np.diff(np.floor(places)))
        texts = [self.tokens[slice(*self.row_splits[r : r + 2])] for r in rows]
        return _make_split(texts, self.labels[rows])


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """Texts as tokens, with labels.

    Two tokens are added to those of the tokenizer: `padding` fills up a text,
    `mask` stands for one to predict.

    Attributes:
      tokenizer: what makes tokens of text.
      subword_model: the tokenizer, as a .model file holds it, where it was
        made from the training text; else empty.
      class_names: of the labels, from 0 on.
      cut: how texts become batches.
      pretraining, training, evaluation: the texts. The labels of the first
        mean nothing.
    """

    tokenizer: tokens.Tokenizer
    subword_model: bytes
    class_names: tuple[str, ...]
    cut: Cut
    pretraining: Split
    training: Split
    evaluation: Split

    @property
    def padding(self) -> int:
        return self.tokenizer.size

    @property
    def mask(self) -> int:
        return self.tokenizer.size + 1

    @property
    def num_tokens(self) -> int:
        """How many different tokens a batch may hold."""
        return self.tokenizer.size + 2

    def masking(self, share: float) -> Masking:
        """What is masked, if it is that share of the tokens."""
        return Masking(
            share,
            self.mask,
            self.tokenizer.size,
            spared=(self.padding, self.tokenizer.separator),
        )

    def steps(self, split: Split) -> int:
        """Whole batches in a split."""
        return len(split.labels) // self.cut.batch_size

    def train_batches(self, split: Split, seed: int) -> tf.data.Dataset:
        """Whole batches of (tokens [B, T], labels [B]), both int32.

        Their order changes with each epoch, and repeats with the seed.
        """
        rows = tf.data.Dataset.range(len(split.labels))
        rows = rows.shuffle(len(split.labels), seed)
        batches = rows.batch(self.cut.batch_size, drop_remainder=True)
        return self._read(split, batches)

    def eval_batches(self) -> tf.data.Dataset:
        """Batches as for training, of each text once and in one order."""
        rows = tf.data.Dataset.range(len(self.evaluation.labels))
        return self._read(self.evaluation, rows.batch(self.cut.batch_size))

    def majority_accuracy(self) -> float:
        """The accuracy of naming the most frequent class, whatever the text."""
        most_frequent = np.argmax(np.bincount(self.training.labels))
        return float(np.mean(self.evaluation.labels == most_frequent))

    def naive_bayes_accuracy(self) -> float:
        """The accuracy of naive Bayes, that knows how frequent tokens are."""
        model = MultinomialNB()
        model.fit(self._counts(self.training), self.training.labels)
        counts = self._counts(self.evaluation)
        return float(model.score(counts, self.evaluation.labels))

    def _counts(self, split):
        ones = np.ones(len(split.tokens), np.int32)
        shape = len(split.labels), self.tokenizer.size
        return scipy.sparse.csr_matrix(
            (ones, split.tokens, split.row_splits), shape
        )

    def _read(self, split, rows):
        texts = tf.RaggedTensor.from_row_splits(split.tokens, split.row_splits)
        labels = tf.constant(split.labels)
        shape = [None, self.cut.sequence_length]

        def read(numbers):
            found = tf.gather(texts, numbers)
            padded = found.to_tensor(self.padding, shape=shape)
            padded = tf.ensure_shape(padded, [*numbers.shape, shape[1]])
            return padded, tf.gather(labels, numbers)

        return rows.map(read, tf.data.AUTOTUNE, deterministic=True)


# A recipe asks for it several times, for its data and for its models.
@functools.lru_cache(maxsize=1)
def load(
    name: str,
    data_dir: str,
    eval_split: str,
    pretrain_split: str,
    label_share: float,
    tokenizer: str,
    vocabulary_size: int,
    cut: Cut,
) -> LabelledText:
    """Prepares a data set and keeps its tokens in memory.

    Args:
      name, data_dir, eval_split: as for `text.load`.
      pretrain_split: split to pretrain on; "" is the one to train on.
      label_share: of the training texts, that have labels to train with; all
        are pretrained on, and make the subwords.
      tokenizer: "subwords" of the training text, or as for
        `tokens.make_tokenizer`.
      vocabulary_size: how many subwords.
      cut: the lengths and batches.

    Raises:
      InputError: the data set or the tokenizer cannot be had; it has no
        labels, or others than its classes; a text is too long; a split has
        too few texts for a batch.
    """
    data = text.load(name, data_dir, eval_split=eval_split)
    names = [data.train_split, data.eval_split]
    if pretrain_split not in ("", data.train_split):
        text.load(name, data_dir, pretrain_split, eval_split)
        names.append(pretrain_split)
    read = {split: _read_split(data, split) for split in names}
    for split in (data.train_split, data.eval_split):
        _check_labels(data, split, read[split][1])

    subword_model = b""
    if tokenizer == "subwords":
        texts = (part for each in read[data.train_split][0] for part in each)
        subword_model = subwords.train(texts, vocabulary_size)
        made = subwords.load(subword_model)
    else:
        made = tokens.make_tokenizer(tokenizer)
    splits = {
        split: _encode(*read[split], made, cut, f"{split!r} of {name!r}")
        for split in names
    }
    loaded = LabelledText(
        made,
        subword_model,
        tuple(data.builder.info.features[data.label_key].names),
        cut,
        splits[pretrain_split or data.train_split],
        splits[data.train_split].share(label_share),
        splits[data.eval_split],
    )
    for split in (loaded.pretraining, loaded.training):
        if not loaded.steps(split):
            raise InputError(
                f"batch_size={cut.batch_size} exceeds the "
                f"{len(split.labels)} texts to train on in {name!r}; use "
                f"{len(split.labels)} or less."
            )
    return loaded


def _read_split(data, split):
    """The texts of each example, in UTF-8, and the labels."""
    pairs = list(data.read_labelled(split).as_numpy_iterator())
    texts = [
        [part.decode(errors="replace") for part in parts] for parts, _ in pairs
    ]
    return texts, np.array([label for _, label in pairs], np.int32)


def _check_labels(data, split, labels):
    is_bad = (labels < 0) | (labels >= data.num_classes)
    if np.any(is_bad):
        raise InputError(
            f"Split {split!r} of {data.name!r} has the label "
            f"{labels[is_bad][0]}, and its classes are 0 to "
            f"{data.num_classes - 1}; choose a split with true labels."
        )


def _encode(texts, labels, tokenizer, cut, where) -> Split:
    rows = [_encode_example(parts, tokenizer) for parts in texts]
    longest = max(map(len, rows))
    length = cut.sequence_length
    if longest > length and not cut.truncate:
        raise InputError(
            f"sequence_length={length} is less than the {longest} tokens of "
            f"the longest text in split {where}; use {longest}, or --truncate "
            "to cut long texts."
        )
    return _make_split([row[:length] for row in rows], labels)


def _make_split(texts, labels) -> Split:
    return Split(
        np.concatenate([np.zeros([0], np.int32), *texts]),
        np.cumsum([0, *map(len, texts)], dtype=np.int64),
        labels,
    )


def _encode_example(parts, tokenizer):
    encoded = []
    for part in parts:
        # Behind each part, so that no text is without a token.
        encoded += [*tokenizer.encode(part), tokenizer.separator]
    return np.array(encoded, np.int32)
