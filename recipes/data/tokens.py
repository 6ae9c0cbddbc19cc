"""From texts to windows of tokens: tokenizers, packing, counting."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tensorflow as tf

from tfamp.errors import InputError

# A byte that no text has stands between two texts.
_SEPARATOR_BYTE = "\0"
_NUM_BYTES = 256

# Texts that are tokenized together: enough to hide what a call costs.
_TEXTS_PER_GROUP = 64


class Tokenizer(Protocol):
    """What turns text into tokens, integers from 0 to `size` - 1.

    Attributes:
      size: how many different tokens there are.
      separator: the token that ends each text.
    """

    size: int
    separator: int

    def tokenize(self, texts: tf.Tensor) -> tf.Tensor:
        """Strings [N] to int32 [T]: all their tokens, separators included."""

    def encode(self, text: str) -> list[int]:
        """The tokens of one text, without a separator."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, also of a sequence that no text has."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of UTF-8 as tokens; byte 0 is the separator."""

    size: int = _NUM_BYTES
    separator: int = ord(_SEPARATOR_BYTE)

    def tokenize(self, texts: tf.Tensor) -> tf.Tensor:
        ended = tf.strings.join([texts, _SEPARATOR_BYTE])
        joined = tf.strings.reduce_join(ended)
        return tf.cast(tf.io.decode_raw(joined, tf.uint8), tf.int32)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        # A vocabulary may be larger than what the tokenizer uses of it.
        known = bytes(token for token in tokens if token < self.size)
        return known.decode(errors="replace")


class SentencePieceTokenizer:
    """The subwords of a SentencePiece model; its end of text separates.

    Args:
      path: a `.model` file, as T5, Llama 2 and Gemma publish theirs.

    Raises:
      InputError: there is no such file, it is no model, it has no end-of-text
        token, or the package is not installed.
    """

    def __init__(self, path: str):
        try:
            import sentencepiece
        except ModuleNotFoundError:
            raise InputError(
                f"tokenizer={path!r} needs a package that is not installed: "
                "pip install sentencepiece."
            ) from None
        if not os.path.isfile(path):
            raise InputError(
                f"There is no tokenizer {path!r}; expected 'bytes' or a "
                "SentencePiece .model file."
            )
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except RuntimeError:
            raise InputError(
                f"tokenizer={path!r} is no SentencePiece .model file."
            ) from None
        self.size = self._model.vocab_size()
        self.separator = self._model.eos_id()
        if self.separator < 0:
            raise InputError(
                f"tokenizer={path!r} has no end-of-text token; train it with "
                "one (eos_id)."
            )

    def tokenize(self, texts: tf.Tensor) -> tf.Tensor:
        tokens = tf.numpy_function(self._tokenize, [texts], tf.int32)
        return tf.ensure_shape(tokens, [None])

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        known = [int(token) for token in tokens if token < self.size]
        return self._model.decode(known)

    def _tokenize(self, texts):
        decoded = [text.decode(errors="replace") for text in texts]
        pieces = self._model.encode(decoded, add_eos=True)
        return np.concatenate(pieces).astype(np.int32)


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a flag names.

    Args:
      name: "bytes", or the path of a SentencePiece model.
    """
    return ByteTokenizer() if name == "bytes" else SentencePieceTokenizer(name)


def pack(
    texts: tf.data.Dataset,
    tokenizer: Tokenizer,
    length: int,
    seed: int | None = None,
) -> tf.data.Dataset:
    """Lays all texts end to end and cuts the tokens into windows.

    A window may hold the end of one text and the beginning of the next. What
    does not fill the last window is left out.

    Args:
      texts: string scalars.
      tokenizer: makes tokens of them, and sets a separator after each.
      length: tokens in a window.
      seed: leaves out up to `length` - 1 tokens at the beginning, another
        number in each epoch, so that windows do not always begin at the same
        places. None leaves out nothing.

    Returns:
      A dataset of int32 [length].
    """
    groups = _tokenized(texts, tokenizer)
    if seed is not None:
        starts = tf.data.Dataset.random(
            seed=seed, rerandomize_each_iteration=True
        )

        def cut_first(indexed, start):
            index, tokens = indexed
            start = tf.where(index == 0, start % length, 0)
            return tokens[start:]

        groups = tf.data.Dataset.zip(groups.enumerate(), starts).map(cut_first)
    return groups.rebatch(length, drop_remainder=True)


def count(texts: tf.data.Dataset, tokenizer: Tokenizer) -> np.ndarray:
    """How often each token occurs, separators included: int64 [size]."""

    def add(counts, tokens):
        return counts + tf.math.bincount(
            tokens,
            minlength=tokenizer.size,
            maxlength=tokenizer.size,
            dtype=tf.int64,
        )

    zeros = tf.zeros([tokenizer.size], tf.int64)
    return _tokenized(texts, tokenizer).reduce(zeros, add).numpy()


def unigram_nats(train_counts: np.ndarray, eval_counts: np.ndarray) -> float:
    """The loss of a model that only knows how frequent each token is.

    Args:
      train_counts: of each token in the training text, [size]. One is added
        to each, so that none is impossible.
      eval_counts: of each token in the text that is predicted, [size].

    Returns:
      The cross-entropy in nats a token.
    """
    shares = (train_counts + 1) / np.sum(train_counts + 1)
    return float(-np.average(np.log(shares), weights=eval_counts))


def _tokenized(texts, tokenizer):
    groups = texts.batch(_TEXTS_PER_GROUP)
    return groups.map(tokenizer.tokenize, tf.data.AUTOTUNE, deterministic=True)
