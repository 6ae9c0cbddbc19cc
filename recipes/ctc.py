"""Connectionist temporal classification: loss, decoding, error rates.

Labels are [B, L]: those of the text, then 0, which is CTC's blank. Logits are
[B, T, C], of T frames.
"""

import keras
import tensorflow as tf
from keras import ops


@keras.saving.register_keras_serializable(package="tfamp_recipes")
class LineCTC(keras.losses.Loss):
    """The CTC loss (Graves et al., 2006), 0 for lines that are too short.

    No path of T frames spells a text that needs more of them: its probability
    is 0, the loss infinite or what an implementation makes of it, and the
    gradient follows. Such lines are left out: they teach nothing, and count
    as 0 in the mean. All of it is float32.

    Args:
        name: of the loss.
        reduction: as of every Keras loss.
    """

    def __init__(self, name="line_ctc", reduction="sum_over_batch_size"):
        super().__init__(name=name, reduction=reduction, dtype="float32")

    def call(self, y_true, y_pred):
        """Labels [B, L], 0 after the text, and logits [B, T, C] to [B]."""
        left_out = is_too_short(y_true, y_pred)
        # Not only afterwards: 0 times an infinite gradient is NaN.
        labels = ops.where(left_out[:, None], 0, ops.cast(y_true, "int32"))
        losses = keras.losses.ctc(labels, y_pred)
        return ops.where(left_out, 0.0, losses)

    def get_config(self):
        return {"name": self.name, "reduction": self.reduction}


@keras.saving.register_keras_serializable(package="tfamp_recipes")
class CharacterErrorRate(keras.metrics.Metric):
    """Edits that make the true texts of what was read, per true character.

    An edit inserts, deletes or replaces a character (Levenshtein, 1966); the
    rate passes 1 where too much is read. Edits and characters are summed up
    before they are divided, so long lines count for more.

    Args:
        name, dtype: as of every Keras metric.
    """

    def __init__(self, name="character_error_rate", dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.edits = self.add_weight(
            shape=(), initializer="zeros", name="edits"
        )
        self.characters = self.add_weight(
            shape=(), initializer="zeros", name="characters"
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Labels [B, L], logits [B, T, C], and weights [B] or None."""
        edits = edit_distances(y_true, y_pred)
        characters = ops.cast(ops.count_nonzero(y_true, axis=-1), self.dtype)
        if sample_weight is not None:
            weights = ops.cast(sample_weight, self.dtype)
            edits, characters = edits * weights, characters * weights
        self.edits.assign_add(ops.sum(edits))
        self.characters.assign_add(ops.sum(characters))

    def result(self):
        """The rate of all lines since the last reset; 0 for no lines."""
        return ops.divide_no_nan(self.edits, self.characters)


@keras.saving.register_keras_serializable(package="tfamp_recipes")
class LinesLeftOut(keras.metrics.Sum):
    """How many lines had too few frames for their text.

    Args:
        name, dtype: as of every Keras metric.
    """

    def __init__(self, name="lines_left_out", dtype=None):
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Labels [B, L], logits [B, T, C], and weights [B] or None."""
        super().update_state(is_too_short(y_true, y_pred), sample_weight)


@keras.saving.register_keras_serializable(package="tfamp_recipes")
def exact_lines(y_true, y_pred):
    """1 for each line that was read without an error, [B]."""
    return ops.cast(edit_distances(y_true, y_pred) == 0, "float32")


def is_too_short(y_true, y_pred):
    """Whether lines have fewer frames than CTC needs for their text.

    It needs one for each character, and a blank between two that are equal.

    Args:
        y_true: labels [B, L], 0 after the text.
        y_pred: logits [B, T, C].

    Returns:
        bool [B].
    """
    is_character = y_true != 0
    is_repeated = (y_true[:, 1:] == y_true[:, :-1]) & is_character[:, 1:]
    needed = ops.count_nonzero(is_character, axis=-1)
    needed += ops.count_nonzero(is_repeated, axis=-1)
    return needed > ops.shape(y_pred)[1]


def edit_distances(y_true, y_pred):
    """Levenshtein distances of true texts and what was read, float32 [B]."""
    distances = tf.edit_distance(
        tf.sparse.from_dense(greedy_decode(y_pred)),
        tf.sparse.from_dense(tf.cast(y_true, tf.int32)),
        normalize=False,
    )
    # It loses the rank where the batch is of unknown size.
    return tf.reshape(distances, [-1])


def greedy_decode(logits):
    """The labels of the best path, int32 [B, T], 0 after the text."""
    batch, frames = ops.shape(logits)[:2]
    decoded, _ = ops.ctc_decode(
        logits, ops.full([batch], frames, dtype="int32"), mask_index=0
    )
    return ops.maximum(decoded[0], 0)
