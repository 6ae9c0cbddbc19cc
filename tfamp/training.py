"""`fit` and `evaluate`: any compiled Keras model, over any strategy.

The numbers are those of the global batch, whatever the number of replicas and
microbatches.
"""

import math
import warnings
from collections.abc import Sequence

import keras
import tensorflow as tf

from tfamp import keras_internals, overflow, preconditions, steps
from tfamp.callbacks import ProgressBar
from tfamp.errors import InputError
from tfamp.evaluation import Evaluator, graph_calls, metrics_now
from tfamp.loss_scale import LossScaleOptimizer, wrap_optimizer
from tfamp.pace import Clock, Pace
from tfamp.precision import precision_of
from tfamp.strategy import devices_of, distribute_batches


def fit(
    model: keras.Model,
    dataset: tf.data.Dataset,
    *,
    epochs: int = 1,
    steps_per_epoch: int | None = None,
    validation_data: tf.data.Dataset | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    microbatches: int = 1,
    steps_per_loop: int | str = "auto",
    jit: bool | str = "auto",
    all_reduce_dtype: str | None = None,
    on_overflow: str = "log",
    verbose: int | str = "auto",
) -> keras.callbacks.History:
    """Trains a compiled Keras model under the strategy it was built in.

    Args:
        model: compiled; `tfamp.wrap_optimizer` makes its optimizer safe on
            every replica, and fit does so itself where that was left out.
        dataset: global batches `(x, y)` or `(x, y, sample_weight)`, in any
            structure that the model takes.
        epochs: how often to go through the dataset.
        steps_per_epoch: batches per epoch, taken on from where the epoch
            before stopped; None for one pass over the dataset.
        validation_data: global batches to evaluate on after each epoch.
        callbacks: any Keras callbacks.
        microbatches: splits each replica's batch in so many; gradients add up
            in float32 and are reduced once.
        steps_per_loop: steps in one graph call, with no Python in between.
            "auto" adapts to the speed of a step; where a callback watches
            single batches it is 1. Callbacks see the end of each call.
        jit: compile forward and backward passes with XLA. "auto": on GPUs and
            TPUs, where all layers allow it.
        all_reduce_dtype: "float16" or "bfloat16" halves what replicas send
            each other; None sends gradients as they are.
        on_overflow: what to do about skipped steps: "log", "ignore", or
            "stop" at the first.
        verbose: 0 nothing, 1 or "auto" a progress bar, 2 a line per epoch.

    Returns:
        The history: the keys of `keras.Model.fit`, and per epoch `loss_scale`,
        `skipped_steps` (of that epoch), `examples_per_second`,
        `step_milliseconds`, and on GPUs `peak_memory_bytes`.

    Raises:
        InputError: for arguments, a model or data that cannot be used.
        LossScaleError: where the scale is at its floor and steps keep
            overflowing; the message names the first non-finite layer.
    """
    preconditions.check_counts({"epochs": epochs, "microbatches": microbatches})
    preconditions.check_counts({"steps_per_epoch": steps_per_epoch})
    preconditions.check_compiled(model)
    strategy = model.distribute_strategy
    preconditions.check_batches(dataset, strategy, microbatches)
    is_custom = type(model).train_step is not keras.Model.train_step
    jit = preconditions.resolve_jit(jit, model, strategy, is_custom)
    if is_custom and microbatches > 1:
        raise InputError(
            f"microbatches={microbatches} needs Keras's own train_step, which "
            f"{type(model).__name__} overrides; accumulate gradients there."
        )
    with strategy.scope():
        if not is_custom:
            _make_optimizer_safe(model)
        keras_internals.build_everything(model, dataset.element_spec)
    if microbatches > 1:
        preconditions.check_can_accumulate(model)
    if not model.trainable_variables:
        raise InputError(f"Model {model.name!r} has no trainable weights.")
    optimizers = _loss_scale_optimizers(model)
    for optimizer in optimizers.values():
        optimizer.all_reduce_dtype = all_reduce_dtype
    progress = _progress(verbose)
    run = _Run(
        model,
        dataset,
        steps.custom_train_step(model)
        if is_custom
        else steps.train_step(model, strategy, microbatches, jit),
        steps_per_epoch=steps_per_epoch,
        validation_data=validation_data,
        watch=overflow.OverflowWatch(
            optimizers,
            on_overflow,
            lambda: "" if is_custom else overflow.explain(model, dataset),
        ),
        steps_per_loop=steps_per_loop,
        watched=any(map(_watches_batches, callbacks)),
        callbacks=keras.callbacks.CallbackList(
            [*callbacks, *progress],
            add_history=True,
            model=model,
            epochs=epochs,
            steps=steps_per_epoch or preconditions.cardinality(dataset),
            verbose=0 if verbose == 0 else 1,
        ),
    )
    model.stop_training = False
    run.callbacks.on_train_begin()
    logs: dict[str, float] = {}
    try:
        for epoch in range(keras_internals.initial_epoch(model), epochs):
            logs = run.epoch(epoch) or logs
            if model.stop_training:
                break
    finally:
        # Keras tells callbacks nothing when training raises.
        for bar in progress:
            bar.close()
    if model.optimizer is not None:
        # Weights that are averaged are the averages from here on.
        model.optimizer.finalize_variable_values(model.trainable_variables)
    run.callbacks.on_train_end(logs)
    return model.history


def evaluate(
    model: keras.Model, dataset: tf.data.Dataset, *, steps: int | None = None
) -> dict[str, float]:
    """Evaluates a compiled model under the strategy it was built in.

    Args:
        model: compiled.
        dataset: global batches, as for `fit`. Every row counts exactly once,
            in a partial last batch too.
        steps: batches to evaluate; None for all.

    Returns:
        The loss and the metrics, by name.

    Raises:
        InputError: for a model or data that cannot be used.
    """
    preconditions.check_compiled(model)
    preconditions.check_counts({"steps": steps})
    evaluator = Evaluator(model, dataset, steps)
    with model.distribute_strategy.scope():
        keras_internals.build_everything(model, dataset.element_spec)
    return evaluator.run()


class _Run:
    """The epochs of one call of fit."""

    def __init__(
        self,
        model: keras.Model,
        dataset: tf.data.Dataset,
        step: steps.Step,
        *,
        steps_per_epoch: int | None,
        validation_data: tf.data.Dataset | None,
        watch: overflow.OverflowWatch,
        steps_per_loop: int | str,
        watched: bool,
        callbacks: keras.callbacks.CallbackList,
    ):
        strategy = model.distribute_strategy
        self.callbacks = callbacks
        self._model = model
        self._loop = steps.Loop(step, strategy, model.run_eagerly)
        self._batches = distribute_batches(strategy, dataset)
        self._iterator = None
        self._is_continuous = steps_per_epoch is not None
        self._num_steps = steps_per_epoch or preconditions.cardinality(dataset)
        self._watch = watch
        self._watched = watched
        self._pace = Pace(
            1 if watched and steps_per_loop == "auto" else steps_per_loop
        )
        self._clock = Clock(self._loop)
        self._average_statistics = steps.average_statistics(model, strategy)
        self._evaluator = (
            None
            if validation_data is None
            else Evaluator(model, validation_data)
        )

    def epoch(self, epoch: int) -> dict[str, float]:
        """Trains and evaluates for one epoch; returns its logs, if any."""
        self._model.reset_metrics()
        self.callbacks.on_epoch_begin(epoch)
        if self._iterator is None or not self._is_continuous:
            self._iterator = iter(self._batches)
        self._watch.begin_epoch()
        self._clock.begin_epoch()
        has_more = True
        while has_more and not self._model.stop_training:
            wanted = self._pace.steps
            if self._num_steps is not None:
                wanted = min(wanted, self._num_steps - self._clock.steps)
            if wanted == 0:
                break
            has_more = self._graph_call(epoch, wanted)
        self._check_steps_done(has_more)
        if self._clock.steps == 0:
            return {}
        logs = self._logs(epoch) | self._clock.logs()
        logs |= _memory_logs(self._model.distribute_strategy)
        self._average_statistics()
        if self._evaluator is not None:
            self.callbacks.on_test_begin()
            results = self._evaluator.run()
            self.callbacks.on_test_end(results)
            logs |= {f"val_{name}": value for name, value in results.items()}
        self.callbacks.on_epoch_end(epoch, logs)
        return logs

    def _graph_call(self, epoch: int, wanted: int) -> bool:
        """Runs some steps; False where the data ended."""
        before = self._clock.steps
        if self._watched:
            self.callbacks.on_train_batch_begin(before)
        with graph_calls(self._model):
            has_more = self._loop.run(self._iterator, wanted)
        done = self._clock.steps - before
        if done and (self._watched or self._pace.is_due()):
            # Reading the metrics waits for the device; hence not each time.
            logs = self._logs(epoch)
            self._pace.measure(done)
            self._clock.end_warm_up()
            logs["examples_per_second"] = self._clock.examples_per_second
            self.callbacks.on_train_batch_end(self._clock.steps - 1, logs)
        return has_more

    def _logs(self, epoch: int) -> dict[str, float]:
        self._watch.check(f"epoch {epoch + 1}, step {self._clock.steps}")
        metrics = metrics_now(self._model, keras.Model.train_step)
        return self._loop.logs | metrics | self._watch.logs()

    def _check_steps_done(self, has_more: bool) -> None:
        done = self._clock.steps
        if self._loop.steps == 0 and not self._model.stop_training:
            raise InputError("The dataset ended before the first batch.")
        if not has_more and (self._is_continuous or done == 0):
            wanted = "" if self._num_steps is None else f" of {self._num_steps}"
            warnings.warn(
                f"The dataset ended after {done}{wanted} steps; training stops "
                "here. Use dataset.repeat().",
                stacklevel=4,
            )
            self._model.stop_training = True
        elif self._num_steps is None:
            self.callbacks.set_params(self.callbacks.params | {"steps": done})


def _memory_logs(strategy: tf.distribute.Strategy) -> dict[str, float]:
    """The peak over devices, since the process began, in bytes."""
    gpus = [
        tf.DeviceSpec.from_string(device)
        for device in devices_of(strategy)
        if "GPU" in device
    ]
    peaks = [
        tf.config.experimental.get_memory_info(f"GPU:{gpu.device_index}")[
            "peak"
        ]
        for gpu in gpus
    ]
    return {"peak_memory_bytes": max(peaks)} if peaks else {}


def _progress(verbose: int | str) -> list[ProgressBar]:
    if verbose not in (0, 1, 2, "auto"):
        raise InputError(f"verbose={verbose!r}; expected 'auto', 0, 1 or 2.")
    if verbose == 0:
        return []
    return [ProgressBar(one_line_per_epoch=verbose == 2)]


def _watches_batches(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback wants to see single batches."""
    if isinstance(callback, ProgressBar):
        return False
    frequency = getattr(
        callback, "save_freq", getattr(callback, "update_freq", None)
    )
    if frequency == "epoch":
        # ModelCheckpoint and TensorBoard define the hooks whether or not.
        return False
    return any(
        getattr(type(callback), hook)
        is not getattr(keras.callbacks.Callback, hook)
        or hook in vars(callback)
        for hook in (
            "on_batch_begin",
            "on_batch_end",
            "on_train_batch_begin",
            "on_train_batch_end",
        )
    )


def _make_optimizer_safe(model: keras.Model) -> None:
    """Puts the optimizer into a `LossScaleOptimizer`, unless it is in one."""
    optimizer = model.optimizer
    if isinstance(optimizer, LossScaleOptimizer):
        return
    options = {}
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # Keras's own corrupts weights when a replica but the first overflows.
        options = {
            "dynamic": True,
            "initial_scale": 2.0 ** round(math.log2(optimizer.initial_scale)),
            "dynamic_growth_steps": optimizer.dynamic_growth_steps,
        }
        optimizer = optimizer.inner_optimizer
    safe = wrap_optimizer(optimizer, precision_of(model), **options)
    keras_internals.replace_optimizer(model, safe)


def _loss_scale_optimizers(
    model: keras.Model,
) -> dict[str, LossScaleOptimizer]:
    """By attribute: a model with its own `train_step` may hold several."""
    return {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, LossScaleOptimizer)
    }
