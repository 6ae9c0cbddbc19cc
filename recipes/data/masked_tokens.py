"""Masked tokens to predict, as BERT is pretrained (Devlin et al., 2018)."""

from typing import NamedTuple

import tensorflow as tf

# Of the chosen tokens so many become the mask, so many another token; the
# others stay, so that the model cannot trust what it sees.
_MASKED, _REPLACED = 0.8, 0.1


class Masking(NamedTuple):
    """What is masked.

    share: of the tokens that are chosen, in each text.
    mask: the token that stands for one to predict.
    num_tokens: those from 0 to num_tokens - 1 may take another's place.
    spared: tokens that are never chosen: padding, separators.
    """

    share: float
    mask: int
    num_tokens: int
    spared: tuple[int, ...]

    def num_positions(self, length: int) -> int:
        """Tokens that are predicted of a text that is `length` long."""
        return max(1, round(self.share * length))


def mask_tokens(
    tokens: tf.Tensor, seed: tf.Tensor, masking: Masking
) -> tuple[tuple[tf.Tensor, tf.Tensor], tf.Tensor, tf.Tensor]:
    """Chooses tokens of each text, and hides most of them.

    All follows from the seed, and the weights from the whole batch: however
    it is then shared out to replicas, the weighted sum of the losses over the
    number of weights is the mean loss of the chosen tokens.

    Args:
      tokens: [B, T], int32.
      seed: two int64s.
      masking: what is masked.

    Returns:
      Inputs, targets and weights, as `fit` takes them, with P positions:
      the tokens with some hidden, [B, T], and the chosen places, [B, P], both
      int32; the tokens that were there, [B, P] int32; and [B, P] float32, 0
      where a text has fewer tokens than P asks for, and else all equal, with
      1 as their mean.
    """
    length = tokens.shape[1]
    num_positions = masking.num_positions(length)
    chance = tf.random.stateless_uniform(
        [3, *tf.unstack(tf.shape(tokens))], seed
    )
    may_choose = _may_choose(tokens, masking)
    # Places in the order in which they are chosen, the spared ones last.
    order = tf.argsort(tf.where(may_choose, chance[0], 2.0))
    rank = tf.argsort(order)
    available = tf.reduce_sum(tf.cast(may_choose, tf.int32), axis=1)
    wanted = tf.round(masking.share * tf.cast(available, tf.float32))
    count = tf.clip_by_value(tf.cast(wanted, tf.int32), 1, num_positions)
    count = tf.minimum(count, available)[:, None]

    other = tf.cast(chance[2] * masking.num_tokens, tf.int32)
    hidden = tf.where(
        chance[1] < _MASKED,
        masking.mask,
        tf.where(chance[1] < _MASKED + _REPLACED, other, tokens),
    )
    positions = order[:, :num_positions]
    is_chosen = tf.cast(tf.range(num_positions) < count, tf.float32)
    weights = tf.math.divide_no_nan(is_chosen, tf.reduce_mean(is_chosen))
    return (
        (tf.where(rank < count, hidden, tokens), positions),
        tf.gather(tokens, positions, batch_dims=1),
        weights,
    )


def hide_tokens(
    tokens: tf.Tensor, seed: tf.Tensor, masking: Masking
) -> tf.Tensor:
    """Masks tokens that nobody asks for, which keeps a classifier general.

    Args:
      tokens: [B, T], int32.
      seed: two int64s.
      masking: what is masked; each token by chance, with its share.
    """
    chance = tf.random.stateless_uniform(tf.shape(tokens), seed)
    is_hidden = (chance < masking.share) & _may_choose(tokens, masking)
    return tf.where(is_hidden, masking.mask, tokens)


def _may_choose(tokens, masking):
    return tf.reduce_all(
        [tf.not_equal(tokens, spared) for spared in masking.spared], axis=0
    )
