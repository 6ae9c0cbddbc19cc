"""Text from a language model, token by token."""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

# Less than the distance of any two logits that matter; more than rounding.
_COLDEST = 1e-6


def generate(
    model: keras.Model,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    sequence_length: int,
    temperature: float = 1.0,
    vocabulary_size: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Continues prompts of one length by sampling from a causal model.

    Each token costs a forward pass over a window of `sequence_length` tokens,
    of constant shape, so that one graph serves all. What lies behind the
    newest token in the window is not seen, and once the window is full it
    moves along with the text.

    Args:
      model: int32 tokens [N, T] to logits [N, T, V].
      prompts: N sequences of tokens, all as long, of one token at least.
      num_tokens: how many to add to each.
      sequence_length: T, which the model was trained with.
      temperature: what logits are divided by, in float32; 0 takes the most
        probable token.
      vocabulary_size: the tokens that may be drawn are those below; None
        allows all.
      seed: of the draws.

    Returns:
      int32 [N, prompt + num_tokens]: the prompts and what follows them.
    """
    prompt = tf.constant(prompts, tf.int32)
    count, given = prompt.shape
    total = given + num_tokens

    def next_tokens(text, position):
        start = tf.maximum(position - sequence_length, 0)
        window = tf.slice(text, [0, start], [count, sequence_length])
        logits = model(window, training=False)[:, position - start - 1]
        logits = tf.cast(logits, tf.float32)[:, :vocabulary_size]
        if temperature < _COLDEST:
            return tf.argmax(logits, axis=-1, output_type=tf.int32)
        return tf.random.stateless_categorical(
            logits / temperature,
            num_samples=1,
            seed=[seed, position],
            dtype=tf.int32,
        )[:, 0]

    @tf.function
    def extend(text):
        for position in tf.range(given, total):
            column = tf.one_hot(position, text.shape[1], dtype=tf.int32)
            text += column * next_tokens(text, position)[:, None]
        return text

    # Zeros stand where tokens will, and behind where a short text ends.
    length = max(total, sequence_length)
    text = tf.pad(prompt, [[0, 0], [0, length - given]])
    return extend(text)[:, :total].numpy()
