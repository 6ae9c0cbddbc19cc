"""One step of training and of evaluation, to be traced into a graph.

A step runs in replica context on a `Share` of the global batch. XLA compiles
forward and backward passes only: reduction and update stay outside, which is
what makes XLA work under every strategy.
"""

import contextlib
import inspect
from collections.abc import Callable

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.checkpoint.frozen import frozen_weights
from tfamp.distribute import reduction
from tfamp.distribute.strategy import Share, split_evenly
from tfamp.layers.cross_entropy import sparse_cross_entropy
from tfamp.scaling.gradients import Gradient

Logs = dict[str, tf.Tensor]
Step = Callable[[Share], Logs]


def train_step(
    model: keras.Model,
    strategy: tf.distribute.Strategy,
    microbatches: int,
    jit: bool,
) -> Step:
    """The training step of a compiled model, for `strategy.run`."""
    optimizer = model.optimizer
    variables = model.trainable_variables
    statistics = _statistics(model)
    replicas = strategy.num_replicas_in_sync

    @tf.autograph.experimental.do_not_convert
    def gradients_of(data, rows, batch_rows) -> tuple[list[Gradient], Logs]:
        """Scaled gradients of these rows' part in the global mean loss."""
        # Keras divides by the rows it sees and by the replicas; this makes it
        # a division by the rows of the global batch.
        weight = tf.cast(rows * replicas, tf.float32) / tf.cast(
            batch_rows, tf.float32
        )
        forget = remember(model.metrics_variables)
        # A function per trace: each replica has variables of its own.
        passes = (
            tf.function(_passes, jit_compile=True, autograph=False)
            if jit
            else _passes
        )
        loss, outputs, masks, gradients = passes(data, weight)
        tf.nest.map_structure(keras_internals.attach_mask, outputs, masks)
        logs = _update_metrics(
            model, data, outputs, loss * replicas, rows, forget
        )
        return gradients, logs

    @tf.autograph.experimental.do_not_convert
    def _passes(data, weight):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            with _lean_losses(jit):
                loss = _compute_loss(model, x, y, outputs, sample_weight)
            loss = tf.cast(loss, tf.float32)
            scaled_loss = optimizer.scale_loss(loss * weight)
        gradients = tape.gradient(scaled_loss, [v.value for v in variables])
        masks = tf.nest.map_structure(keras_internals.mask_of, outputs)
        return loss, outputs, masks, gradients

    @tf.autograph.experimental.do_not_convert
    def step(share: Share) -> Logs:
        def gradients_of_piece(i):
            data, rows = split_evenly(share.data, i, microbatches)
            # None counts of a share whose only row must not.
            rows = tf.minimum(rows, share.rows)
            return gradients_of(data, rows, share.batch_rows)[0]

        forget = remember(statistics)
        if microbatches == 1:
            gradients, logs = gradients_of(*share)
        else:
            gradients = _accumulate(gradients_of_piece, microbatches, variables)
            logs = {}
        optimizer.apply(gradients, variables)
        if statistics:
            # What is not trained on must not move the averages of evaluation.
            is_skipped = optimizer.consecutive_skips > 0
            tf.cond(is_skipped, forget, lambda: None)
        return logs

    return step


def custom_train_step(model: keras.Model) -> Step:
    """The step of a model that overrides `train_step`, as it wrote it."""

    @tf.autograph.experimental.do_not_convert
    def step(share: Share) -> Logs:
        return _unlisted(model, model.train_step(share.data))

    return step


def evaluation_step(model: keras.Model) -> Step:
    """The evaluation step of a compiled model; counts each row once."""

    @tf.autograph.experimental.do_not_convert
    def step(share: Share) -> Logs:
        def count() -> None:
            model.test_step(share.data)

        tf.cond(share.rows > 0, count, lambda: None)
        return {}

    return step


def average_statistics(
    model: keras.Model, strategy: tf.distribute.Strategy
) -> Callable[[], None]:
    """A function that makes all replicas agree on moving statistics.

    Every replica moves the averages of its batch normalizations by its own
    rows. Their mean is what evaluation and checkpoints should see.
    """
    statistics = _statistics(model)

    def average() -> None:
        means = reduction.mean([tf.convert_to_tensor(v) for v in statistics])
        for variable, mean in zip(statistics, means, strict=True):
            variable.assign(mean)

    @tf.function
    @tf.autograph.experimental.do_not_convert
    def average_everywhere() -> None:
        strategy.run(average)

    has_any = statistics and strategy.num_replicas_in_sync > 1
    return average_everywhere if has_any else lambda: None


def _statistics(model: keras.Model) -> list[tf.Variable]:
    """What forward passes move: means and variances of batches, and the like.

    A frozen base of many gigabytes is none of it: neither what a frozen layer
    has, nor what was made to be trained and no longer is.
    """
    frozen = {id(variable) for variable in frozen_weights(model)}
    return [
        variable.value
        for variable in model.non_trainable_variables
        if keras.backend.is_float_dtype(variable.dtype)
        and id(variable) not in frozen
        # Keras leaves to TensorFlow's variable what it was made as.
        and not variable.value.trainable
    ]


def remember(variables) -> Callable[[], None]:
    """A function that gives the variables back the values they have now."""
    values = [tf.convert_to_tensor(variable) for variable in variables]

    def forget() -> None:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    return forget


def _lean_losses(jit: bool) -> contextlib.AbstractContextManager:
    if jit:
        # XLA makes one loop of it by itself.
        return contextlib.nullcontext()
    return keras_internals.sparse_cross_entropy_replaced(sparse_cross_entropy)


def _compute_loss(model, x, y, outputs, sample_weight):
    arguments = {"x": x, "y": y, "y_pred": outputs}
    arguments["sample_weight"] = sample_weight
    # Models written for early Keras 3 override it without `training`.
    if "training" in inspect.signature(model.compute_loss).parameters:
        arguments["training"] = True
    return model.compute_loss(**arguments)


def _update_metrics(model, data, outputs, loss, rows, forget) -> Logs:
    """Counts the rows, unless they do not count or were not numbers.

    One NaN would make the epoch's mean NaN, though training goes on without
    that batch. The optimizer counts it as a skipped step. `forget` undoes
    what `compute_loss` counted: the losses of single outputs.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    tracker = keras_internals.loss_tracker(model)

    def update_loss() -> None:
        tracker.update_state(loss, sample_weight=tf.cast(rows, tf.float32))

    def update_metrics() -> Logs:
        return model.compute_metrics(x, y, outputs, sample_weight=sample_weight)

    def update() -> None:
        update_loss()
        update_metrics()

    counts = tf.logical_and(tf.math.is_finite(loss), rows > 0)
    if type(model).compute_metrics is keras.Model.compute_metrics:
        if model.metrics == [tracker]:
            # A mean alone can do without a branch, which takes its time.
            tracker.update_state(
                tf.where(counts, loss, 0.0),
                sample_weight=tf.cast(tf.where(counts, rows, 0), tf.float32),
            )
        else:
            tf.cond(counts, update, forget)
        return {}
    # An override may return more than the model's metrics hold.
    logs = _unlisted(model, update_metrics())
    tf.cond(counts, update_loss, forget)
    return logs


def _unlisted(model: keras.Model, logs: Logs | None) -> Logs:
    """Of the logs of a step, those that no metric of the model holds.

    Its loss is among them: a step of its own may leave Keras's mean alone.
    """
    names = {metric.name for metric in model.metrics}
    names |= set(model.get_metrics_result())
    names -= {keras_internals.loss_tracker(model).name}
    return {
        name: value for name, value in (logs or {}).items() if name not in names
    }


def _accumulate(
    gradients_of_piece: Callable[[tf.Tensor], list[Gradient]],
    pieces: int,
    variables: list[keras.Variable],
) -> list[tf.Tensor | None]:
    """Sums the pieces' gradients in float32, one piece in memory at a time."""
    dtypes = [
        tf.float64 if variable.dtype == "float64" else tf.float32
        for variable in variables
    ]
    overwrites = [
        keras_internals.overwrites_with_gradient(v) for v in variables
    ]
    is_connected = [False] * len(variables)

    def add(sum_, gradient, position):
        if gradient is None:
            return sum_
        is_connected[position] = True
        gradient = tf.cast(tf.convert_to_tensor(gradient), sum_.dtype)
        if overwrites[position]:
            return tf.maximum(sum_, gradient)
        return sum_ + gradient

    def body(i, sums):
        gradients = gradients_of_piece(i)
        return i + 1, [
            add(sum_, gradient, position)
            for position, (sum_, gradient) in enumerate(
                zip(sums, gradients, strict=True)
            )
        ]

    zeros = [
        tf.zeros(variable.shape, dtype)
        for variable, dtype in zip(variables, dtypes, strict=True)
    ]
    _, sums = tf.while_loop(
        lambda i, _: i < pieces,
        body,
        (tf.constant(0), zeros),
        parallel_iterations=1,
        maximum_iterations=pieces,
    )
    return [
        sum_ if connected else None
        for sum_, connected in zip(sums, is_connected, strict=True)
    ]
