"""Batches for a language model: windows of tokens, and the tokens after."""

import dataclasses
import functools
import math

import numpy as np
import tensorflow as tf

from recipes.data import text, tokens
from tfamp.errors import InputError

# What is shuffled at a time: texts before they are packed, windows after.
_SHUFFLED_TEXTS = 16384
_SHUFFLED_WINDOWS = 16384

# Data sets up to this size stay in memory.
_CACHED_BYTES = 2**30

# Of a split of which only a part is read, so many texts are counted.
_COUNTED_TEXTS = 10_000


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a text is cut into batches.

    Attributes:
      sequence_length: tokens that are seen at once.
      batch_size: sequences in a batch.
      steps_per_epoch: batches after which an epoch of training ends, while
        the text is repeated as needed; 0 ends it with the text.
      eval_steps: batches to evaluate on, from the beginning of the split; 0
        takes the whole split.
    """

    sequence_length: int
    batch_size: int
    steps_per_epoch: int = 0
    eval_steps: int = 0

    @property
    def window(self) -> int:
        """Tokens in a window: the last one is only predicted."""
        return self.sequence_length + 1


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text as tokens.

    Attributes:
      data: the data set.
      tokenizer: what makes tokens of it.
      cut: how it is cut.
      train_counts, eval_counts: how often each token occurs in a split; where
        the steps are limited, in the beginning of the split.
      eval_bytes: of the text that `eval_counts` counts.
    """

    data: text.TextData
    tokenizer: tokens.Tokenizer
    cut: Cut
    train_counts: np.ndarray
    eval_counts: np.ndarray
    eval_bytes: int

    @property
    def num_windows(self) -> int:
        """Windows in an epoch of the training text, at the least."""
        # Up to `window` - 1 tokens are left out at the beginning.
        left = int(np.sum(self.train_counts)) - (self.cut.window - 1)
        return max(left, 0) // self.cut.window

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch of training."""
        whole_text = self.num_windows // self.cut.batch_size
        return self.cut.steps_per_epoch or whole_text

    @property
    def eval_steps(self) -> int:
        """Batches to evaluate on, the last of which may be smaller."""
        windows = int(np.sum(self.eval_counts)) // self.cut.window
        all_steps = -(-windows // self.cut.batch_size)
        return min(self.cut.eval_steps or all_steps, all_steps)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """A loss in a unit that does not depend on the tokenizer."""
        bits_per_token = nats_per_token / math.log(2)
        return float(
            bits_per_token * np.sum(self.eval_counts) / self.eval_bytes
        )

    def train_batches(self, seed: int) -> tf.data.Dataset:
        """Batches of (tokens, the token after each), both int32 [B, T].

        The order of the texts, the places where windows begin and the order
        of the windows change with each epoch, and repeat with the seed.
        """
        texts = self._texts(self.data.train_split, seed)
        texts = texts.shuffle(_SHUFFLED_TEXTS, seed)
        windows = tokens.pack(texts, self.tokenizer, self.cut.window, seed)
        windows = windows.shuffle(_SHUFFLED_WINDOWS, seed)
        if self.cut.steps_per_epoch:
            windows = windows.repeat()
        batches = windows.batch(self.cut.batch_size, drop_remainder=True)
        return _finished(batches, self.steps_per_epoch)

    def eval_batches(self) -> tf.data.Dataset:
        """Batches as for training, of each window once and in one order."""
        texts = self._texts(self.data.eval_split, seed=None)
        if self.cut.eval_steps:
            texts = texts.take(_COUNTED_TEXTS)
        windows = tokens.pack(texts, self.tokenizer, self.cut.window)
        batches = windows.batch(self.cut.batch_size)
        return _finished(batches, self.eval_steps)

    def describe_baselines(self) -> str:
        """What predicting without a model costs, in a line."""
        uniform = math.log(self.tokenizer.size)
        unigram = tokens.unigram_nats(self.train_counts, self.eval_counts)
        return (
            "bits per byte without a model: "
            f"{self.bits_per_byte(uniform):.3f} if every token is as likely, "
            f"{self.bits_per_byte(unigram):.3f} by how frequent each is"
        )

    def _texts(self, split, seed):
        texts = self.data.read(split, seed)
        fits = self.data.num_bytes(split) <= _CACHED_BYTES
        return texts.cache() if fits else texts


# A recipe asks for it twice, for its data and for its model.
@functools.lru_cache(maxsize=1)
def load(
    name: str, data_dir: str, eval_split: str, tokenizer: str, cut: Cut
) -> Corpus:
    """Prepares a data set and counts its tokens, which takes one pass.

    Args:
      name, data_dir, eval_split: as for `text.load`.
      tokenizer: as for `tokens.make_tokenizer`.
      cut: the windows and batches.

    Raises:
      InputError: the data set or the tokenizer cannot be had, or the text is
        too short for a window or for a batch.
    """
    data = text.load(name, data_dir, eval_split=eval_split)
    tokenizer = tokens.make_tokenizer(tokenizer)
    train_texts = data.read(data.train_split)
    eval_texts = data.read(data.eval_split)
    if cut.steps_per_epoch:
        train_texts = train_texts.take(_COUNTED_TEXTS)
    if cut.eval_steps:
        eval_texts = eval_texts.take(_COUNTED_TEXTS)
    corpus = Corpus(
        data,
        tokenizer,
        cut,
        train_counts=tokens.count(train_texts, tokenizer),
        eval_counts=tokens.count(eval_texts, tokenizer),
        eval_bytes=text.count_bytes(eval_texts),
    )
    # A window, and in training what is left out before the first one.
    _check_length(corpus, data.train_split, 2 * cut.window - 1)
    _check_length(corpus, data.eval_split, cut.window)
    if not corpus.steps_per_epoch:
        raise InputError(
            f"batch_size={cut.batch_size} exceeds the {corpus.num_windows} "
            f"sequences of {cut.sequence_length} tokens in the training text "
            f"of {name!r}; use {corpus.num_windows} or less."
        )
    return corpus


def _check_length(corpus: Corpus, split: str, needed: int) -> None:
    data = corpus.data
    is_train = split == data.train_split
    found = np.sum(corpus.train_counts if is_train else corpus.eval_counts)
    if found < needed:
        raise InputError(
            f"sequence_length={corpus.cut.sequence_length} needs {needed} "
            f"tokens in a split, and split {split!r} of {data.name!r} has "
            f"{found}; use a shorter one."
        )


def _finished(batches: tf.data.Dataset, steps: int) -> tf.data.Dataset:
    batches = batches.take(steps).map(_shifted, tf.data.AUTOTUNE)
    batches = batches.apply(tf.data.experimental.assert_cardinality(steps))
    return batches.prefetch(tf.data.AUTOTUNE)


def _shifted(windows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return windows[:, :-1], windows[:, 1:]
