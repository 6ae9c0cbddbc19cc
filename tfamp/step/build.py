"""One step of training and of evaluation, to be traced into a graph.

A step runs in replica context on a `Share` of the global batch. XLA compiles
forward and backward passes only: reduction and update stay outside, which is
what makes XLA work under every strategy.
"""

import contextlib
import functools
from collections.abc import Callable, Collection
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals, tensorflow_internals
from tfamp.checkpoint.frozen import frozen_weights
from tfamp.distribute import reduction
from tfamp.distribute.strategy import (
    Share,
    computes_on_gpus,
    split_evenly,
)
from tfamp.layers.cross_entropy import sparse_cross_entropy
from tfamp.scaling.backward import gradients_scaled_by
from tfamp.scaling.gradients import Gradient, map_values
from tfamp.scaling.moved_state import kept_by_caller
from tfamp.scaling.optimizer import LossScaleOptimizer
from tfamp.scaling.own_loss import OwnStep, Part, rows_known
from tfamp.step import losses
from tfamp.step.batch_statistics import BatchStatistics
from tfamp.step.logs import flattened
from tfamp.step.terms import Plan

Logs = dict[str, tf.Tensor]
Step = Callable[[Share], Logs]

# The log of a step that says whether its loss was a number.
NAN_LOG = "loss_is_nan"


def train_step(
    model: keras.Model,
    strategy: tf.distribute.Strategy,
    microbatches: int,
    jit: bool,
    plan: Plan | None = None,
    reports_nan: bool = False,
) -> Step:
    """The training step of a compiled model, for `strategy.run`.

    A step that is skipped leaves batch statistics and metrics as they were.

    Args:
        model: compiled and built.
        strategy: what it runs under.
        microbatches: pieces of a replica's share.
        jit: compile forward and backward passes with XLA.
        plan: what the terms of the loss are, where the batch is trained on in
            pieces; None for what the reductions tell.
        reports_nan: returns `NAN_LOG` too: nan where the loss was no number.
    """
    optimizer = model.optimizer
    variables = model.trainable_variables
    statistics = _statistics(model)
    is_whole = strategy.num_replicas_in_sync * microbatches == 1

    @tf.autograph.experimental.do_not_convert
    def gradients_of(
        data, rows, batch_rows, pieces=None
    ) -> tuple[list[Gradient], tf.Tensor, Callable]:
        """Scaled gradients of these rows' part in the loss of the batch.

        And their loss, and what counts them if they were trained on.
        """
        forget = remember(model.metrics_variables)
        # A function per trace: each replica has variables of its own.
        passes = (
            tf.function(
                tensorflow_internals.differentiated_within()(_passes),
                jit_compile=True,
                autograph=False,
            )
            if jit
            else _passes
        )
        loss, outputs, masks, gradients = passes(
            data, rows, batch_rows, *(pieces or (None, []))
        )
        tf.nest.map_structure(keras_internals.attach_mask, outputs, masks)
        # A loss that was not reduced logs the mean of its entries.
        loss = tf.reduce_mean(loss)

        def count(is_applied: tf.Tensor) -> Logs:
            return _update_metrics(
                model, data, outputs, loss, rows, is_applied, forget
            )

        return gradients, loss, count

    @tf.autograph.experimental.do_not_convert
    def _passes(data, rows, batch_rows, plan, counts):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            outputs = losses.call(model, x, training=True)
            with _lean_losses(jit):
                arguments = (x, y, outputs, sample_weight)
                if plan is None:
                    trained = logged = losses.compute_loss(model, *arguments)
                    part = 1.0
                else:
                    trained, logged = losses.loss_of_piece(
                        model, plan, _part(rows, batch_rows), counts, arguments
                    )
                    part = tf.cast(rows, tf.float32) / tf.cast(
                        batch_rows, tf.float32
                    )
            logged = tf.cast(logged, tf.float32)
            scaled_loss = optimizer.scale_loss(
                tf.cast(trained, tf.float32) * part
            )
        sources = [keras_internals.stored(v) for v in variables]
        with gradients_scaled_by(optimizer):
            gradients = tape.gradient(scaled_loss, sources)
        gradients = [
            # A weight that is kept in 16 bits is one of float32 all the same.
            map_values(functools.partial(tf.cast, dtype=v.dtype), gradient)
            for v, gradient in zip(variables, gradients, strict=True)
        ]
        masks = tf.nest.map_structure(keras_internals.mask_of, outputs)
        return logged, outputs, masks, gradients

    def gradients_of_share(share, pieces):
        if microbatches == 1:
            return gradients_of(*share, pieces)

        averages = BatchStatistics(model)

        def gradients_of_piece(i, state):
            data, rows = split_evenly(share.data, i, microbatches)
            # None counts of a share whose only row must not.
            rows = tf.minimum(rows, share.rows)
            gradients, loss, count = gradients_of(
                data, rows, share.batch_rows, pieces
            )
            # One piece is in memory at a time: it counts while it is there.
            count(tf.constant(True))
            moved, losses = state
            return gradients, (averages.after_piece(moved, rows), losses + loss)

        gradients, (moved, loss) = _accumulate(
            gradients_of_piece,
            microbatches,
            variables,
            (averages.start(), tf.constant(0.0)),
        )
        averages.settle(moved)
        return gradients, loss, None

    @tf.autograph.experimental.do_not_convert
    def step(share: Share) -> Logs:
        pieces = None if is_whole else _pieces(model, plan, share, True)
        state = statistics
        if microbatches > 1:
            state = [*statistics, *model.metrics_variables]
        forget = remember(state)
        gradients, loss, count = gradients_of_share(share, pieces)
        with kept_by_caller():
            optimizer.apply(gradients, variables)
        is_applied = tf.equal(optimizer.consecutive_skips, 0)
        logs = count(is_applied) if count else {}
        if state:
            # What is not trained on must not move the averages of evaluation.
            tf.cond(is_applied, lambda: None, forget)
        if reports_nan:
            nan = tf.constant(float("nan"))
            logs |= {NAN_LOG: tf.where(tf.math.is_finite(loss), 0.0, nan)}
        return logs

    return step


def custom_train_step(
    model: keras.Model, optimizers: Collection[LossScaleOptimizer] = ()
) -> Step:
    """The step of a model that overrides `train_step`, as it wrote it.

    Args:
        model: compiled and built.
        optimizers: where one of them skips, batch statistics and metrics are
            as they were before the step.
    """
    state = [*_statistics(model), *model.metrics_variables]
    is_alone = model.distribute_strategy.num_replicas_in_sync == 1
    of_rows = [] if is_alone else _metrics_of_rows(model)
    own_step = OwnStep(model)

    @tf.autograph.experimental.do_not_convert
    def step(share: Share) -> Logs:
        forget = remember(state)
        forget_rows = remember(of_rows)
        before = [tf.convert_to_tensor(o.skipped_steps) for o in optimizers]
        with (
            rows_known(share.rows, share.batch_rows),
            own_step.here(),
            kept_by_caller(),
        ):
            logs = model.train_step(share.data)
        if of_rows:
            # A replica without rows has one that must not count.
            tf.cond(share.rows > 0, lambda: None, forget_rows)
        if optimizers and state:
            after = [tf.convert_to_tensor(o.skipped_steps) for o in optimizers]
            is_skipped = tf.reduce_any(tf.not_equal(before, after))
            tf.cond(is_skipped, forget, lambda: None)
        return _unlisted(model, logs)

    return step


def evaluation_step(
    model: keras.Model,
    strategy: tf.distribute.Strategy,
    plan: Plan | None = None,
) -> Step:
    """The evaluation step of a compiled model; counts each row once.

    Args:
        model: compiled and built.
        strategy: what it runs under.
        plan: what the terms of the loss are, where there are several
            replicas; None for what the reductions tell.
    """
    is_whole = strategy.num_replicas_in_sync == 1

    @tf.autograph.experimental.do_not_convert
    def test_piece(share: Share, plan: Plan, counts: list[tf.Tensor]) -> None:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(share.data)
        outputs = losses.call(model, x, training=False)
        _, logged = losses.loss_of_piece(
            model,
            plan,
            _part(share.rows, share.batch_rows),
            counts,
            (x, y, outputs, sample_weight),
            training=False,
        )
        keras_internals.loss_tracker(model).update_state(
            logged, sample_weight=tf.cast(share.rows, tf.float32)
        )
        if type(model).compute_metrics is keras.Model.compute_metrics:
            keras_internals.count_in_metrics(model, y, outputs, sample_weight)
        else:
            model.compute_metrics(x, y, outputs, sample_weight=sample_weight)

    @tf.autograph.experimental.do_not_convert
    def step(share: Share) -> Logs:
        pieces = None if is_whole else _pieces(model, plan, share, False)

        def count() -> None:
            if pieces is None:
                model.test_step(share.data)
            else:
                test_piece(share, *pieces)

        tf.cond(share.rows > 0, count, lambda: None)
        return {}

    return step


def custom_evaluation_step(
    model: keras.Model, strategy: tf.distribute.Strategy, returned: set[str]
) -> Step:
    """The step of a model that overrides `test_step`, as it wrote it.

    Args:
        model: compiled and built.
        strategy: what it runs under.
        returned: gets the names of all that `test_step` returns.

    Returns:
        A step. Of what no metric holds it returns each replica's part, by its
        rows, so that the mean over replicas is that of the batch.
    """
    replicas = strategy.num_replicas_in_sync
    state = model.metrics_variables

    @tf.autograph.experimental.do_not_convert
    def step(share: Share) -> Logs:
        part = tf.cast(share.rows * replicas, tf.float32) / tf.cast(
            share.batch_rows, tf.float32
        )
        forget = remember(state)
        with rows_known(share.rows, share.batch_rows), Part("mean").of_keras():
            logs = model.test_step(share.data)
        # A replica without rows was given one that does not count.
        tf.cond(share.rows > 0, lambda: None, forget)
        returned.update(flattened(logs))
        values = {
            name: keras.ops.cast(value, "float32")
            for name, value in _unlisted(model, logs).items()
        }
        return {
            name: tf.math.multiply_no_nan(value, part)
            for name, value in values.items()
        }

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

    has_any = statistics and strategy.num_replicas_in_sync > 1
    if not has_any:
        return lambda: None
    return tensorflow_internals.graph_function(lambda: strategy.run(average))


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


def _metrics_of_rows(model: keras.Model) -> list[keras.Variable]:
    """What counts rows, of metrics: all but means and sums of any numbers.

    Those may be of losses, of which each replica has its part.
    """
    return [
        variable
        for metric in model.metrics
        if type(metric) not in (keras.metrics.Mean, keras.metrics.Sum)
        for variable in metric.variables
    ]


def remember(variables) -> Callable[..., None]:
    """A function that gives the variables back the values they have now.

    Called with `unless`, a boolean scalar, it does so where that is false, and
    no one has to read it.
    """
    values = [tf.convert_to_tensor(variable) for variable in variables]

    def forget(unless: tf.Tensor | None = None) -> None:
        for variable, value in zip(variables, values, strict=True):
            if unless is not None:
                now = tf.convert_to_tensor(variable)
                value = tf.where(unless, now, value)
            variable.assign(value)

    return forget


def _lean_losses(jit: bool) -> contextlib.AbstractContextManager:
    if jit:
        # XLA makes one loop of it by itself.
        return contextlib.nullcontext()
    return keras_internals.sparse_cross_entropy_replaced(sparse_cross_entropy)


def _pieces(
    model: keras.Model, plan: Plan | None, share: Share, training: bool
) -> tuple[Plan, list[tf.Tensor]]:
    """What the pieces of a batch need to know of the whole."""
    if plan is None:
        plan = losses.outline(model, share.data, training)
    counts = losses.denominators(model, plan, share.data, share.rows, training)
    return plan, counts


def _part(rows: tf.Tensor, batch_rows: tf.Tensor) -> tf.Tensor:
    """The part of the batch that a piece is; of no rows as if of one."""
    rows = tf.maximum(rows, 1)
    return tf.cast(rows, tf.float32) / tf.cast(batch_rows, tf.float32)


def _update_metrics(
    model, data, outputs, loss, rows, is_applied, forget
) -> Logs:
    """Counts the rows, unless they do not count or were not trained on.

    One NaN would make the epoch's mean NaN, though training goes on without
    that batch. The optimizer counts it as a skipped step. `forget` undoes
    what `compute_loss` counted: the losses of single outputs.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    tracker = keras_internals.loss_tracker(model)

    def update_loss() -> None:
        tracker.update_state(loss, sample_weight=tf.cast(rows, tf.float32))

    def update() -> None:
        update_loss()
        keras_internals.count_in_metrics(model, y, outputs, sample_weight)

    counts = tf.logical_and(tf.math.is_finite(loss), rows > 0)
    counts = tf.logical_and(counts, is_applied)
    if type(model).compute_metrics is keras.Model.compute_metrics:
        if model.metrics == [tracker]:
            # A mean alone can do without a branch, which takes its time.
            tracker.update_state(
                tf.where(counts, loss, 0.0),
                sample_weight=tf.cast(tf.where(counts, rows, 0), tf.float32),
            )
        elif computes_on_gpus(
            tf.distribute.get_strategy()
        ) and keras_internals.metrics_are_kerass(model):
            # A branch would wait for the device.
            update()
            forget(unless=counts)
        else:
            tf.cond(counts, update, forget)
        return {}
    # An override may return more than the model's metrics hold.
    results = model.compute_metrics(x, y, outputs, sample_weight=sample_weight)
    logs = _unlisted(model, results)
    tf.cond(counts, update_loss, forget)
    return logs


def _unlisted(model: keras.Model, logs: Logs | None) -> Logs:
    """Of the logs of a step, those that no metric of the model holds.

    Its loss is among them: a step of its own may leave Keras's mean alone.
    """
    names = {metric.name for metric in model.metrics}
    names |= set(flattened(model.get_metrics_result()))
    names -= {keras_internals.loss_tracker(model).name}
    return {
        name: value
        for name, value in flattened(logs).items()
        if name not in names
    }


def _accumulate(
    gradients_of_piece: Callable[[tf.Tensor, Any], tuple[list[Gradient], Any]],
    pieces: int,
    variables: list[keras.Variable],
    state: Any,
) -> tuple[list[tf.Tensor | None], Any]:
    """Sums the pieces' gradients in float32, one piece in memory at a time.

    Args:
        gradients_of_piece: takes and returns what pieces pass on, too.
        pieces: how many.
        variables: those of the gradients.
        state: what the first piece gets.
    """
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
        # TensorFlow may not know it of a broadcast axis of one.
        gradient.set_shape(sum_.shape)
        if overwrites[position]:
            return tf.maximum(sum_, gradient)
        return sum_ + gradient

    def body(i, sums, state):
        gradients, state = gradients_of_piece(i, state)
        sums = [
            add(sum_, gradient, position)
            for position, (sum_, gradient) in enumerate(
                zip(sums, gradients, strict=True)
            )
        ]
        return i + 1, sums, state

    zeros = [
        tf.zeros(variable.shape, dtype)
        for variable, dtype in zip(variables, dtypes, strict=True)
    ]
    _, sums, state = tf.while_loop(
        lambda i, *_: i < pieces,
        body,
        (tf.constant(0), zeros, state),
        parallel_iterations=1,
        maximum_iterations=pieces,
    )
    return [
        sum_ if connected else None
        for sum_, connected in zip(sums, is_connected, strict=True)
    ], state
