"""Loss and update of the global batch against NumPy in float64.

    python -m benchmarks.global_batch [--replicas=1,2,3] [--microbatches=1,2,3]
        [--jit=off,on] [--losses NAME ...]
    python -m tfamp.launch --workers=2 benchmarks.global_batch

One step of one table of embeddings, 7 rows of 5 tokens, one row all padding:
pieces are uneven and have different numbers of valid tokens. The largest
relative difference of the update and of the losses that `fit` logs and
`evaluate` returns, with XLA and without, is printed for each way to write a
loss. Figures hold for any device; each takes some seconds.
"""

import argparse
import sys
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import tfamp

ROWS, TOKENS, CLASSES, WORDS = 7, 5, 3, 6

_GENERATOR = np.random.default_rng(0)
LENGTHS = np.array([5, 1, 3, 0, 2, 5, 4])
VALID = np.arange(TOKENS) < LENGTHS[:, None]
IDS = _GENERATOR.integers(1, WORDS, (ROWS, TOKENS)) * VALID
LABELS = _GENERATOR.integers(0, CLASSES, (ROWS, TOKENS))
TARGETS = _GENERATOR.standard_normal((ROWS, TOKENS, CLASSES))
TOKEN_WEIGHTS = _GENERATOR.uniform(0, 3, (ROWS, TOKENS))
# Keras wants an axis for the tokens.
ROW_WEIGHTS = _GENERATOR.uniform(0, 3, (ROWS, 1))
TABLE = _GENERATOR.standard_normal((WORDS, CLASSES))
SECOND_WEIGHT = 0.25


class Reference(NamedTuple):
    """By hand, in float64: the logged loss, and the gradient of the table."""

    loss: float
    gradient: np.ndarray


def squares(table):
    """The losses of the tokens, and their gradients by the outputs."""
    errors = table[IDS] - TARGETS
    return (errors**2).mean(-1), 2 * errors / CLASSES


def cross_entropies(table):
    exponentials = np.exp(table[IDS])
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    right = np.eye(CLASSES)[LABELS]
    return -np.log((probabilities * right).sum(-1)), probabilities - right


def by_hand(weights, values_of=squares, logged_by=1.0):
    """The weighted sum of the tokens' losses."""
    weights = np.broadcast_to(weights, (ROWS, TOKENS))
    values, gradients = values_of(TABLE)
    gradient = np.zeros_like(TABLE)
    np.add.at(gradient, IDS, weights[..., None] * gradients)
    return Reference(float((weights * values).sum()) * logged_by, gradient)


_MEAN = 1 / VALID.size
_MASKED = VALID / VALID.sum()
REFERENCES = {
    "plain": by_hand(_MEAN),
    "mask_zero": by_hand(_MASKED),
    "ignore_class": by_hand(_MASKED, cross_entropies),
    "mean_with_sample_weight": by_hand(TOKEN_WEIGHTS / TOKEN_WEIGHTS.sum()),
    "token weights": by_hand(TOKEN_WEIGHTS * _MEAN),
    "row weights": by_hand(ROW_WEIGHTS * _MEAN),
    "masked row weights": by_hand(ROW_WEIGHTS * _MASKED),
    "sum": by_hand(1.0),
    "masked sum": by_hand(VALID * 1.0),
    # Keras trains on the sum of what was not reduced, and logs the mean.
    "None": by_hand(1.0, logged_by=_MEAN),
    "own scalar sum": by_hand(1.0),
    "own scalar mean": by_hand(_MEAN),
    "own sum of a row": by_hand(1.0 / ROWS),
    "own compute_loss": by_hand(_MEAN),
    "add_loss vector": by_hand(1 / TOKENS),
    "add_loss sum": by_hand(1.0),
    "add_loss mean": by_hand(_MEAN),
    "two outputs with masks": by_hand(
        _MASKED + SECOND_WEIGHT * (_MASKED * ROW_WEIGHTS)
    ),
}


def _root_mean_square():
    mean = REFERENCES["plain"]
    root = float(np.sqrt(mean.loss))
    return Reference(root, mean.gradient / (2 * root))


# Neither mean nor sum of rows: right in one piece, and refused in several.
REFUSED = {"own root mean square": _root_mean_square()}


class Added(keras.layers.Layer):
    """Gives `add_loss` the squares of tokens, reduced in one way."""

    def __init__(self, how, **options):
        super().__init__(**options)
        self.how = how

    def call(self, outputs, targets):
        each = keras.ops.mean(keras.ops.square(outputs - targets), axis=-1)
        rows = keras.ops.mean(each, axis=-1)
        self.add_loss(
            {
                "add_loss vector": rows[:, None],
                "add_loss sum": keras.ops.sum(each),
                "add_loss mean": keras.ops.mean(each),
            }[self.how]
        )
        return outputs


class OwnLoss(keras.Model):
    """Its loss is a mean that it takes itself."""

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        return keras.ops.mean(keras.ops.square(y_pred - y))


def own_sum(y, outputs):
    each = keras.ops.mean(keras.ops.square(outputs - y), axis=-1)
    return keras.ops.sum(each)


def own_mean(y, outputs):
    return keras.ops.mean(keras.ops.square(outputs - y))


def own_root_mean_square(y, outputs):
    return keras.ops.sqrt(own_mean(y, outputs))


def own_row_sum(y, outputs):
    each = keras.ops.mean(keras.ops.square(outputs - y), axis=-1)
    return keras.ops.sum(each, axis=-1)


def build(case):
    """A compiled model whose one step shows the gradient."""
    is_masked = "mask" in case
    ids = keras.Input([TOKENS], dtype="int32", name="ids")
    table = keras.layers.Embedding(WORDS, CLASSES, mask_zero=is_masked)
    inputs = {"ids": ids}
    outputs = table(ids)
    reduction = {"sum": "sum", "masked sum": "sum", "None": None}.get(
        case,
        case if case == "mean_with_sample_weight" else "sum_over_batch_size",
    )
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    weights = None
    if case == "ignore_class":
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=-1
        )
    elif case.startswith("add_loss"):
        inputs["targets"] = keras.Input([TOKENS, CLASSES], name="targets")
        outputs, loss = Added(case)(outputs, inputs["targets"]), None
    elif case == "two outputs with masks":
        outputs = {
            "a": keras.layers.Identity(name="a")(outputs),
            "b": keras.layers.Identity(name="b")(outputs),
        }
        loss, weights = {"a": loss, "b": "mse"}, {"a": 1.0, "b": SECOND_WEIGHT}
    loss = {
        "own scalar sum": own_sum,
        "own scalar mean": own_mean,
        "own sum of a row": own_row_sum,
        "own root mean square": own_root_mean_square,
    }.get(case, loss)
    cls = OwnLoss if case == "own compute_loss" else keras.Model
    model = cls(inputs, outputs)
    table.set_weights([TABLE])
    model.compile(keras.optimizers.SGD(1.0), loss=loss, loss_weights=weights)
    return model


def data(case):
    """The batch; the dataset does not tell its size."""
    targets = TARGETS.astype("float32")
    tokens = TOKEN_WEIGHTS.astype("float32")
    rows = ROW_WEIGHTS.astype("float32")
    batch = {"ids": IDS.astype("int32")}, targets
    if case == "ignore_class":
        batch = batch[0], np.where(VALID, LABELS, -1)
    elif case in ("mean_with_sample_weight", "token weights"):
        batch = *batch, tokens
    elif case in ("row weights", "masked row weights"):
        batch = *batch, rows
    elif case.startswith("add_loss"):
        batch = ({**batch[0], "targets": targets},)
    elif case == "two outputs with masks":
        ones = np.ones_like(rows)
        batch = batch[0], {"a": targets, "b": targets}, {"a": ones, "b": rows}
    return tf.data.Dataset.from_tensor_slices(batch).batch(ROWS)


def differences(case, strategy, microbatches, jit=False, evaluates=True):
    """Relative differences of update, logged loss and evaluated loss."""
    with strategy.scope():
        model = build(case)
    reference = (REFERENCES | REFUSED)[case]
    evaluated = reference.loss
    if evaluates:
        evaluated = tfamp.evaluate(model, data(case))["loss"]
    history = tfamp.fit(
        model, data(case), microbatches=microbatches, jit=jit, verbose=0
    )
    update = TABLE.astype("float32") - model.get_weights()[0]
    return (
        _relative(update, reference.gradient),
        _relative(history.history["loss"][0], reference.loss),
        _relative(evaluated, reference.loss),
    )


def _relative(value, reference):
    return float(np.max(np.abs(value - reference)) / np.max(np.abs(reference)))


def differences_of_keras(case):
    """The same of update and logged loss of `Model.fit`, on one device."""
    model, reference = build(case), (REFERENCES | REFUSED)[case]
    history = model.fit(data(case), verbose=0).history
    update = TABLE.astype("float32") - model.get_weights()[0]
    return (
        _relative(update, reference.gradient),
        _relative(history["loss"][0], reference.loss),
    )


def cell(case, strategy, microbatches, jits, refused):
    """The figures of one way to split the batch, or that it is refused."""
    found = []
    try:
        for jit in jits:
            evaluates = microbatches == 1 and jit == jits[0]
            found.append(
                differences(case, strategy, microbatches, jit, evaluates)
            )
    except tfamp.InputError as error:
        refused.setdefault(case, str(error))
        return "refused"
    update, *losses = np.max(found, axis=0)
    return f"{update:.0e}, {max(losses):.0e}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", default="1,2,3")
    parser.add_argument("--microbatches", default="1,2,3")
    parser.add_argument("--losses", nargs="*", default=[*REFERENCES, *REFUSED])
    parser.add_argument("--strategy", default="mirrored")
    parser.add_argument("--jit", default="off,on")
    arguments = parser.parse_args(argv)
    jits = [each == "on" for each in arguments.jit.split(",")]
    pieces = [int(each) for each in arguments.microbatches.split(",")]
    is_chief = True
    if arguments.strategy == "multi_worker":
        strategy = tfamp.get_strategy("multi_worker")
        is_chief = strategy.cluster_resolver.task_id == 0
        strategies = {f"{strategy.num_replicas_in_sync} workers": strategy}
    else:
        replicas = [int(each) for each in arguments.replicas.split(",")]
        strategies = {
            f"{each} replica{'s' * (each > 1)}": tfamp.get_strategy(
                "mirrored", num_devices=each
            )
            # The most first: the process gets its devices once.
            for each in sorted(replicas, reverse=True)
        }
    splits = [(name, k) for name in reversed(strategies) for k in pieces]
    has_keras = arguments.strategy != "multi_worker"

    def show(*cells):
        if is_chief:
            print("| " + " | ".join(cells) + " |", flush=True)

    columns = [f"{name}, {k} piece{'s' * (k > 1)}" for name, k in splits]
    keras_column = ["`Model.fit`"] * has_keras
    show("loss", *keras_column, *columns)
    show("---", *["---"] * (len(splits) + has_keras))
    refused = {}
    for case in arguments.losses:
        cells = []
        if has_keras:
            cells.append("{:.0e}, {:.0e}".format(*differences_of_keras(case)))
        for name, k in splits:
            cells.append(cell(case, strategies[name], k, jits, refused))
        show(case, *cells)
    for case, line in refused.items():
        if is_chief:
            print(f"\n{case}: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
