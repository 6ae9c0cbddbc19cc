"""`fit` and `evaluate`: any compiled Keras model, over any strategy.

The numbers are those of the global batch, whatever the number of replicas and
microbatches.
"""

import math
import os
from collections.abc import Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.checkpoint.store import Checkpoints
from tfamp.distribute.consensus import is_chief
from tfamp.distribute.workers import worker_errors
from tfamp.errors import InputError
from tfamp.overflow import watch
from tfamp.overflow.kept_step import KeptStep
from tfamp.overflow.replay import Replay
from tfamp.precision.policy import precision_of
from tfamp.scaling.optimizer import LossScaleOptimizer, wrap_optimizer
from tfamp.step import build
from tfamp.training import data, observers, preconditions
from tfamp.training.callbacks import FILE_WRITERS, ProgressBar, ScaleTimeline
from tfamp.training.evaluation import Evaluator
from tfamp.training.run import Run


def fit(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: int | str = "auto",
    callbacks: Any = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: bool | str = True,
    class_weight: dict[int, float] | None = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: int | Collection[int] = 1,
    microbatches: int = 1,
    steps_per_loop: int | str = "auto",
    jit: bool | str = "auto",
    all_reduce_dtype: str | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_frozen: bool = True,
    keep_float32: bool | str = "auto",
    on_overflow: str = "log",
) -> keras.callbacks.History:
    """Trains a compiled Keras model under the strategy it was built in.

    All arguments of `keras.Model.fit` mean what they mean there.

    Args:
        model: compiled; `tfamp.wrap_optimizer` makes its optimizer safe on
            every replica, and fit does so itself where that was left out.
        x: arrays, tensors, dicts and lists of them, or batches `(x, y)` or
            `(x, y, sample_weight)`: a `tf.data.Dataset`, a `PyDataset`, a
            generator, a PyTorch `DataLoader`, a grain dataset. Batches are
            global: replicas share them.
        y: targets, for arrays.
        batch_size: rows of a global batch, for arrays; None for 32.
        epochs: the epoch to train up to.
        verbose: 0 nothing, 1 or "auto" a progress bar, 2 a line per epoch.
        callbacks: any Keras callbacks: a list, one, or a `CallbackList`.
        validation_split: this share of the rows, the last, is evaluated on.
        validation_data: evaluated on after each epoch; as x, or `(x, y)`, or
            `(x, y, sample_weight)`.
        shuffle: shuffles arrays before each epoch.
        class_weight: weight of each class in the loss.
        sample_weight: weight of each row in the loss, for arrays.
        initial_epoch: the epoch to begin with.
        steps_per_epoch: batches per epoch, taken on from where the epoch
            before stopped; None for one pass over the data.
        validation_steps: batches to evaluate on; None for all.
        validation_batch_size: None for `batch_size`.
        validation_freq: evaluates every so many epochs, or after these.
        microbatches: splits each replica's batch in so many; gradients add up
            in float32 and are reduced once.
        steps_per_loop: steps in one graph call, with no Python in between.
            "auto" adapts to the speed of a step; where a callback watches
            single batches it is 1. Callbacks see the end of each call.
        jit: compile forward and backward passes with XLA. "auto": what
            `compile(jit_compile=...)` said; else on GPUs and TPUs, where all
            layers allow it.
        all_reduce_dtype: "float16" or "bfloat16" halves what replicas send
            each other; None sends gradients as they are.
        checkpoint_dir: saves there by itself, at each epoch's end and every
            five minutes, and goes on from there when it is called again: it
            ends with the weights of a run that was never stopped. SIGTERM
            saves and ends the process with status 75. The best by validation
            loss is in `best/`.
        checkpoint_frozen: False leaves the weights of layers whose
            `trainable` is False out of the checkpoints, such as a base that
            is fine-tuned by low-rank weights. To go on, the model must have
            them again, from the file that they came from: others are refused.
        keep_float32: "auto" calls `tfamp.keep_float32(model)` where it was
            left out of a model with 16-bit layers, and says so; False does
            not.
        on_overflow: what to do about skipped steps: "ignore" them; "log" how
            many there were; "blame" what overflowed first, which layer on
            which replica, in the first step of a stretch, by running it again
            (`tfamp.overflow.replay`; of the first eight stretches each, then
            of the 16th, the 32nd, ...); or "stop" at the first, and say that.
            The numbers of the training are the same with all of them.

    Returns:
        The history: the keys of `keras.Model.fit`, and per epoch `loss_scale`,
        `skipped_steps` (of that epoch), `examples_per_second`,
        `step_milliseconds`, and on GPUs `peak_memory_bytes`.

    Raises:
        InputError: for arguments, a model or data that cannot be used.
        LossScaleError: where the scale is at its floor and 20 steps in a row
            overflowed, or at the first for "stop"; the message names what was
            at fault, and the first non-finite layer.
        WorkerLostError: another worker stopped answering.
        Preempted: SIGTERM came, and the run is saved in `checkpoint_dir`.
    """
    preconditions.check_counts({"epochs": epochs}, least=0)
    preconditions.check_counts({"initial_epoch": initial_epoch}, least=0)
    preconditions.check_counts(
        {
            "microbatches": microbatches,
            "batch_size": batch_size,
            "steps_per_epoch": steps_per_epoch,
            "validation_steps": validation_steps,
            "validation_batch_size": validation_batch_size,
        }
    )
    preconditions.check_compiled(model)
    strategy = model.distribute_strategy
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = data.split(
            x, y, sample_weight, validation_split
        )
    batches = data.Batches(
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        steps=steps_per_epoch,
        shuffle=shuffle,
        class_weight=class_weight,
    )
    observer = observers.current()
    dataset = observer.change_dataset(batches.dataset)
    callbacks = [*tf.nest.flatten(callbacks or []), *observer.callbacks]
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
    progress = _progress(verbose if is_chief(strategy) else 0)
    kept = _kept_step(model, optimizers)
    callbacks_here = _callbacks_here(callbacks, strategy)
    run = Run(
        model,
        dataset,
        _step(model, is_custom, microbatches, jit),
        steps_per_epoch=steps_per_epoch,
        validation_data=validation_data,
        watch=watch.OverflowWatch(
            optimizers,
            on_overflow,
            kept
            and Replay(
                model,
                _step(model, is_custom, microbatches=1, jit=False),
                optimizers,
                kept,
                microbatches,
            ),
            [
                callback.on_scale_event
                for callback in callbacks_here
                if isinstance(callback, ScaleTimeline)
            ],
        ),
        kept=kept,
        checkpoints=None
        if checkpoint_dir is None
        else Checkpoints(
            model,
            os.fspath(checkpoint_dir),
            with_frozen=checkpoint_frozen,
        ),
        steps_per_loop=steps_per_loop,
        watched=any(map(_watches_batches, callbacks)),
        callbacks=keras.callbacks.CallbackList(
            [*callbacks_here, *progress],
            add_history=True,
            model=model,
            epochs=epochs,
            steps=steps_per_epoch or preconditions.cardinality(dataset),
            verbose=0 if verbose == 0 else 1,
        ),
    )
    model.stop_training = False
    try:
        with worker_errors():
            return run.epochs(epochs)
    finally:
        # Keras tells callbacks nothing when training raises.
        for bar in progress:
            bar.close()


def evaluate(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = None,
    sample_weight: Any = None,
    steps: int | None = None,
    callbacks: Any = None,
    verbose: int | str = 0,
    return_dict: bool = True,
) -> dict[str, float] | list[float] | float:
    """Evaluates a compiled model under the strategy it was built in.

    Every row counts exactly once, in a partial last batch too.

    Args:
        model: compiled.
        x: arrays or batches, as for `fit`.
        y: targets, for arrays.
        batch_size: rows of a global batch, for arrays; None for 32.
        sample_weight: weight of each row in the loss, for arrays.
        steps: batches to evaluate; None for all.
        callbacks: any Keras callbacks.
        verbose: anything but 0 prints the results in one line.
        return_dict: False for a list, as of `keras.Model.evaluate`.

    Returns:
        The loss and the metrics, by name.

    Raises:
        InputError: for a model or data that cannot be used.
        WorkerLostError: another worker stopped answering.
    """
    preconditions.check_compiled(model)
    preconditions.check_counts({"steps": steps, "batch_size": batch_size})
    batches = data.Batches(
        x, y, sample_weight, batch_size=batch_size, steps=steps
    )
    evaluator = Evaluator(model, batches.dataset, batches.steps)
    with model.distribute_strategy.scope():
        keras_internals.build_everything(model, batches.dataset.element_spec)
    with worker_errors():
        return evaluator.run()


def _step(
    model: keras.Model, is_custom: bool, microbatches: int, jit: bool
) -> build.Step:
    if is_custom:
        return build.custom_train_step(model)
    strategy = model.distribute_strategy
    return build.train_step(model, strategy, microbatches, jit)


def _kept_step(
    model: keras.Model, optimizers: dict[str, LossScaleOptimizer]
) -> KeptStep | None:
    """None where steps are looked at in reports only.

    A TPU computes on its own: to look at each step would make it wait.
    """
    is_tpu = isinstance(model.distribute_strategy, tf.distribute.TPUStrategy)
    return KeptStep(model, optimizers) if optimizers and not is_tpu else None


def _progress(verbose: int | str) -> list[ProgressBar]:
    if verbose not in (0, 1, 2, "auto"):
        raise InputError(f"verbose={verbose!r}; expected 'auto', 0, 1 or 2.")
    if verbose == 0:
        return []
    return [ProgressBar(one_line_per_epoch=verbose == 2)]


def _callbacks_here(
    callbacks: Sequence[keras.callbacks.Callback],
    strategy: tf.distribute.Strategy,
) -> list[keras.callbacks.Callback]:
    """Those that run on this worker: of several, one writes files.

    All others run everywhere, since they may set the learning rate or stop.
    """
    if is_chief(strategy):
        return list(callbacks)
    return [each for each in callbacks if not isinstance(each, FILE_WRITERS)]


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
