"""The loss of the global batch from passes over its pieces."""

import inspect
from typing import Any

import keras
import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.step import terms
from tfamp.step.terms import Plan


def outline(model: keras.Model, data: Any, training: bool) -> Plan:
    """The terms of a model's loss as their reductions tell, by one trace.

    Args:
        model: compiled and built.
        data: a batch, or specs of one.
        training: whether as in training.
    """
    found: list[terms.Terms] = []

    @tensorflow_internals.differentiated_within()
    def pass_(data) -> None:
        found.append(recorded(model, data, training)[0])

    if model.run_eagerly:
        pass_(data)
    else:
        specs = tf.nest.map_structure(_spec, data)
        tf.function(pass_, autograph=False).get_concrete_function(specs)
    return plan_of(found[0])


def denominators(
    model: keras.Model,
    plan: Plan,
    data: Any,
    rows: tf.Tensor,
    training: bool,
) -> list[tf.Tensor]:
    """What the counted losses are divided by, over all replicas.

    The pass is traced for its masks and weights alone. What they do not
    depend on, TensorFlow drops: where masks come from inputs nothing is left
    but they. Call it in replica context.

    Args:
        model: compiled and built.
        plan: what its terms are.
        data: the replica's rows.
        rows: how many of them count.
        training: whether for a loss as in training.
    """
    if not any(plan.counted):
        return []
    found, _ = recorded(model, data, training=False, of_training=training)
    counts = [
        tf.where(rows > 0, tf.cast(leaf.denominator, tf.float32), 0.0)
        for leaf, is_counted in zip(found.leaves, plan.counted, strict=True)
        if is_counted
    ]
    replica = tf.distribute.get_replica_context()
    total = replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.stack(counts))
    return tf.unstack(total)


def compute_loss(
    model: keras.Model,
    x: Any,
    y: Any,
    outputs: Any,
    sample_weight: Any,
    training: bool = True,
) -> tf.Tensor:
    """`compute_loss` of the model, also as early Keras 3 wrote it."""
    arguments = {"x": x, "y": y, "y_pred": outputs}
    arguments["sample_weight"] = sample_weight
    # Models written for early Keras 3 override it without `training`.
    if "training" in inspect.signature(model.compute_loss).parameters:
        arguments["training"] = training
    return model.compute_loss(**arguments)


def loss_of_piece(
    model: keras.Model,
    plan: Plan,
    share: tf.Tensor,
    counts: list[tf.Tensor],
    arguments: tuple[Any, Any, Any, Any],
    training: bool = True,
) -> tuple[tf.Tensor, tf.Tensor]:
    """What a piece trains on and what is logged of it.

    Of both the mean over pieces, by rows, is that of the global batch.

    Args:
        model: compiled and built.
        plan: what its terms are.
        share: the part of the global batch's rows that the piece holds.
        counts: the denominators.
        arguments: x, y, outputs and weights.
        training: whether as in training.
    """
    with terms.shared(model, plan, share, counts):
        loss = compute_loss(model, *arguments, training=training)
    if loss.shape.rank != 0:
        # Gradients add up what was not reduced; Keras logs its mean.
        trained = tf.reduce_sum(loss) / tf.cast(share, loss.dtype)
        return trained, tf.reduce_mean(loss)
    if plan.total == terms.SUM:
        loss = loss / tf.cast(share, loss.dtype)
    loss = loss * plan.total_factor
    return loss, loss


def recorded(
    model: keras.Model,
    data: Any,
    training: bool,
    is_moved: bool = False,
    of_training: bool | None = None,
) -> tuple[terms.Terms, tf.Tensor]:
    """The terms of a pass that leaves no trace, and the whole loss.

    Args:
        model: compiled and built.
        data: a batch, or specs of one.
        training: whether layers are called as in training.
        is_moved: whether weights are moved a little, which tells what is 0 by
            chance.
        of_training: whether the loss is that of training; None for as layers.
    """
    of_training = training if of_training is None else of_training
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

    def pass_():
        outputs = call(model, x, training)
        with terms.recorded(model) as found:
            loss = compute_loss(
                model, x, y, outputs, sample_weight, training=of_training
            )
        return found, loss

    return terms.run_unseen(model, pass_, is_moved)


def call(model: keras.Model, x: Any, training: bool) -> Any:
    """The outputs of a model, as a step of Keras asks for them."""
    return model(x, training=training)


def plan_of(found: terms.Terms) -> Plan:
    """What the terms are as their reductions tell."""
    return Plan(
        leaves=tuple(leaf.kind for leaf in found.leaves),
        counted=tuple(leaf.is_counted for leaf in found.leaves),
        added=(terms.MEAN,) * len(found.added),
    )


def _spec(value: Any) -> Any:
    if value is None or isinstance(value, tf.TypeSpec):
        return value
    return tf.type_spec_from_value(value)
