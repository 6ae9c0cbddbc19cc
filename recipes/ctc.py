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
    """Levenshtein distances of true texts and what was read, float32 [B].

    A row of the table of distances at a time, for all lines at once: GPUs have
    no kernel of tf.edit_distance, and a step would wait for the host.

    Args:
        y_true: labels [B, L], 0 after the text.
        y_pred: logits [B, T, C].
    """
    found_BxT = _read(y_pred)
    true_BxL = tf.cast(y_true, tf.float32)
    rows = tf.shape(found_BxT)[0]
    frames = found_BxT.shape[1]
    frames = tf.shape(found_BxT)[1] if frames is None else frames
    columns = tf.cast(tf.range(frames + 1), tf.float32)[tf.newaxis]

    def next_row(i, row):
        label = true_BxL[:, i : i + 1]
        # Of what was read, one more is left out, or one is replaced.
        deleted = row + 1.0
        replaced = row[:, :-1] + tf.cast(found_BxT != label, tf.float32)
        best = tf.concat(
            [deleted[:, :1], tf.minimum(deleted[:, 1:], replaced)], axis=1
        )
        # Or any number of characters is put in before.
        inserted = columns + _least_so_far(best - columns)
        return i + 1, tf.where(label != 0.0, inserted, row)

    _, row = tf.while_loop(
        lambda i, _: i < tf.shape(true_BxL)[1],
        next_row,
        (0, tf.tile(columns, [rows, 1])),
        shape_invariants=(
            tf.TensorShape([]),
            tf.TensorShape([None, columns.shape[1]]),
        ),
    )
    length = tf.math.count_nonzero(found_BxT, axis=1, dtype=tf.float32)
    is_last = columns == length[:, tf.newaxis]
    distances = tf.reduce_sum(tf.where(is_last, row, 0.0), axis=1)
    return tf.ensure_shape(distances, [y_pred.shape[0]])


def greedy_decode(logits):
    """The labels of the best path, int32 [B, T], 0 after the text."""
    return tf.cast(_read(logits), tf.int32)


def _read(logits):
    """What `greedy_decode` returns, in float32, which all devices compare."""
    best = tf.cast(tf.argmax(logits, axis=-1), tf.float32)
    before = tf.concat([tf.zeros_like(best[:, :1]), best[:, :-1]], axis=1)
    is_read = (best != 0.0) & (best != before)
    # The place of each among those of its line; others have none.
    place = tf.cumsum(tf.cast(is_read, tf.float32), axis=1) - 1.0
    batch, frames = tf.shape(best)[0], tf.shape(best)[1]
    begin = tf.range(batch, dtype=tf.int64)[:, tf.newaxis]
    place = tf.cast(place, tf.int64) + begin * tf.cast(frames, tf.int64)
    places = tf.reshape(tf.where(is_read, place, -1), [-1])
    labels = tf.math.unsorted_segment_sum(
        tf.reshape(best, [-1]), places, batch * frames
    )
    return tf.ensure_shape(tf.reshape(labels, [batch, frames]), best.shape)


def _least_so_far(values):
    """Of each row, the least value up to each column: [B, N]."""
    columns = values.shape[1]
    doublings = 16 if columns is None else (columns - 1).bit_length()
    infinite = tf.fill(tf.shape(values), float("inf"))
    for i in range(doublings):
        step = 2**i
        moved = tf.concat([infinite[:, :step], values[:, :-step]], axis=1)
        values = tf.minimum(values, moved)
    return values
