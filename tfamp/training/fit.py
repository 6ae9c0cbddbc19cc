"""`fit` and `evaluate`: any compiled Keras model, over any strategy.

The numbers are those of the global batch, whatever the number of replicas and
microbatches.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, overload

import keras
import tensorflow as tf

from tfamp import keras_internals, tensorflow_internals
from tfamp.checkpoint.callback_state import CallbackStates
from tfamp.checkpoint.place import full_disks_told
from tfamp.checkpoint.preemption import ending_on_sigterm
from tfamp.checkpoint.store import Checkpoints
from tfamp.distribute.agreement import check_alike
from tfamp.distribute.consensus import is_chief, number_of_workers
from tfamp.distribute.parting import part
from tfamp.distribute.strategy import computes_on_gpus
from tfamp.distribute.workers import worker_errors
from tfamp.errors import InputError
from tfamp.overflow import watch
from tfamp.overflow.kept_step import KeptStep
from tfamp.overflow.replay import Replay
from tfamp.precision.layer_paths import walk
from tfamp.precision.policy import precision_of
from tfamp.scaling.optimizer import LossScaleOptimizer
from tfamp.step import build
from tfamp.step.terms import Plan
from tfamp.step.trial import plan_of
from tfamp.training import (
    alike,
    data,
    hooks,
    misplaced,
    observers,
    preconditions,
    programs,
    safe,
    swapped_averages,
    wire,
)
from tfamp.training.autolog import callbacks_of_autolog
from tfamp.training.callbacks import ScaleTimeline
from tfamp.training.evaluation import Evaluator
from tfamp.training.loop import Loop
from tfamp.training.narrow_weights import in_16_bits
from tfamp.training.progress_bar import ProgressBar, format_figures
from tfamp.training.run import Run
from tfamp.training.warning import warn


@ending_on_sigterm(if_given="checkpoint_dir")
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
    checkpoint_dir: str | bytes | os.PathLike | None = None,
    checkpoint_frozen: bool = True,
    keep_float32: bool | str = "auto",
    on_overflow: str = "log",
) -> keras.callbacks.History:
    """Trains a compiled Keras model under the strategy it was built in.

    All arguments of `keras.Model.fit` mean what they mean there. The step that
    was traced serves the next call too, unless something of the model or of
    what it was compiled with has changed; variables of modules that its code
    reads do not count, as in Keras.

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
            in float32 and are reduced once. What cannot be as in one piece:
            batch normalization normalizes each piece by its own statistics;
            its averages move once, by those of all rows.
        steps_per_loop: steps in one graph call, with no Python in between.
            "auto" adapts to the speed of a step; where a callback watches
            single batches it is 1. Callbacks see the end of each call.
        jit: compile forward and backward passes with XLA. "auto": what
            `compile(jit_compile=...)` said; else on GPUs and TPUs, where all
            layers allow it.
        all_reduce_dtype: "float16" or "bfloat16" halves what replicas send
            each other: 2 bytes for each weight and step instead of 4. None
            sends gradients as they are. "float16" keeps 3 bits more and needs
            a loss scale, also of a float32 model: fit turns dynamic scaling
            on where no scale was chosen.
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
        SaveError: a disk is full, or `checkpoint_dir` has gone: what was saved
            before is whole.
        LossScaleError: where the scale is at its floor and 20 steps in a row
            overflowed, or at the first for "stop"; the message names what was
            at fault, and the first non-finite layer.
        WorkerLostError: another worker stopped answering.
        Preempted: SIGTERM came, and the run is saved in `checkpoint_dir`.
    """
    preconditions.check_runs_eagerly("tfamp.fit")
    preconditions.check_counts(
        {"epochs": epochs, "initial_epoch": initial_epoch}, least=0
    )
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
    preconditions.check_optimizer(model)
    preconditions.check_takes("tfamp.fit", model, x, y)
    preconditions.check_validation_freq(validation_freq)
    misplaced.check_scope(model)
    strategy = model.distribute_strategy
    tensorflow_internals.separate_collectives(strategy)
    is_shown = bool(verbose)
    verbose = verbose if is_chief(strategy) else 0
    epochs = _capped(epochs)
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = data.split(
            x, y, sample_weight, validation_split
        )
    batches = data.Batches(
        x,
        y,
        sample_weight,
        strategy=strategy,
        batch_size=batch_size,
        steps=steps_per_epoch,
        shuffle=shuffle,
        class_weight=class_weight,
    )
    batches.warn_of_batch_size("batch_size", batch_size)
    observer = observers.current()
    batches.change(observer.change_dataset)
    dataset = batches.dataset
    if batches.steps is None:
        preconditions.check_ends(dataset)
    preconditions.check_batches(dataset, strategy, microbatches)
    is_custom = type(model).train_step is not keras.Model.train_step
    preconditions.check_own_step(model, microbatches)
    jit = preconditions.resolve_jit(jit, model, strategy, is_custom)
    steps_per_loop = preconditions.resolve_steps_per_loop(steps_per_loop, model)
    callbacks = [*hooks.flattened(callbacks), *observer.callbacks]
    autolog = callbacks_of_autolog(callbacks)
    callbacks += autolog
    progress = _progress(verbose, callbacks)
    with strategy.scope():
        spec = dataset.element_spec
        safe.build_layers(model, spec, is_custom)
        safe.make_safe(model, keep_float32, verbose, is_custom, spec)
        safe.build_rest(model, spec, is_custom)
    misplaced.warn_of(model)
    preconditions.warn_of_eager_sums(model)
    preconditions.warn_of_endless_kernels(model, strategy)
    if microbatches > 1:
        preconditions.check_can_accumulate(model)
    # Keras's own step trains what there is, and says where that is nothing.
    is_custom = is_custom or not model.trainable_variables
    plan = None
    if not is_custom:
        pieces = strategy.num_replicas_in_sync * microbatches
        plan = plan_of(model, spec, batches.first, pieces, training=True)
    optimizers = _loss_scale_optimizers(model)
    scaled = wire.prepare(
        optimizers.values(), all_reduce_dtype, strategy, is_custom
    )
    if scaled:
        safe.say(verbose, scaled)
    if number_of_workers(strategy) > 1:
        arguments = {
            "epochs": epochs,
            "initial_epoch": initial_epoch,
            "steps_per_epoch": batches.steps,
            "number of batches": batches.count,
            "validation_freq": validation_freq,
            "validation": validation_data is not None,
            "microbatches": microbatches,
            "steps_per_loop": steps_per_loop,
            "watching batches": hooks.watch_batches(callbacks, "train"),
            "jit": jit,
            "all_reduce_dtype": all_reduce_dtype,
            "checkpoint_dir": checkpoint_dir is not None,
            "on_overflow": on_overflow,
        }
        facts = alike.facts_at_begin(model, dataset, arguments)
        with worker_errors():
            check_alike(strategy, facts)
    callbacks_here = hooks.callbacks_here(callbacks, strategy)
    callback_list = keras.callbacks.CallbackList(
        [*swapped_averages.followed(callbacks_here, model), *progress],
        add_history=True,
        model=model,
        epochs=epochs,
        steps=batches.steps or batches.count,
        verbose=1 if verbose == "auto" else verbose,
    )
    evaluator = _evaluator_of(
        model,
        validation_data,
        callback_list,
        batch_size=validation_batch_size or batch_size,
        steps=validation_steps,
        # On all workers alike, whoever's callbacks it is for.
        watched=hooks.watch_batches(callbacks, "test"),
    )
    loop_of_steps = _loop(
        model,
        dataset.element_spec,
        optimizers,
        is_custom=is_custom,
        microbatches=microbatches,
        jit=jit,
        plan=plan,
        reports_nan=hooks.stop_at_nan(callbacks),
        # On all workers alike, whoever's callbacks they are.
        is_told=on_overflow != "ignore"
        or any(isinstance(each, ScaleTimeline) for each in callbacks),
    )
    with loop_of_steps as loop:
        replay = None
        if loop.kept is not None:
            step = _step(model, optimizers, is_custom, 1, False, plan)
            replay = Replay(model, step, optimizers, loop.kept, microbatches)
        run = Run(
            model,
            batches,
            loop,
            evaluator=evaluator,
            validation_freq=validation_freq,
            watch=watch.OverflowWatch(
                optimizers,
                on_overflow,
                replay,
                [
                    callback.on_scale_event
                    for callback in callbacks_here
                    if isinstance(callback, ScaleTimeline)
                ],
            ),
            checkpoints=None
            if checkpoint_dir is None
            else Checkpoints(
                model,
                checkpoint_dir,
                with_frozen=checkpoint_frozen,
                callbacks=CallbackStates(callbacks_here),
            ),
            steps_per_loop=steps_per_loop,
            watched=hooks.watch_batches(callbacks, "train"),
            callbacks=callback_list,
        )
        model.stop_training = False
        try:
            with worker_errors(), full_disks_told():
                with in_16_bits(model, dataset.element_spec):
                    history = run.epochs(epochs, initial_epoch)
                if is_shown and run.leaves_averages and evaluator is not None:
                    # On all workers alike, whichever of them shows it.
                    results = evaluator.run(callbacks=False)
                    for bar in progress:
                        bar.show_final(
                            {f"val_{name}": v for name, v in results.items()}
                        )
                part(strategy)
                return history
        finally:
            # Keras tells callbacks nothing when training raises.
            for bar in progress:
                bar.close()
            for each in autolog:
                each.close()


@overload
def evaluate(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = ...,
    sample_weight: Any = ...,
    steps: int | None = ...,
    callbacks: Any = ...,
    verbose: int | str = ...,
    return_dict: Literal[True] = ...,
) -> dict[str, float]: ...


@overload
def evaluate(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = ...,
    sample_weight: Any = ...,
    steps: int | None = ...,
    callbacks: Any = ...,
    verbose: int | str = ...,
    return_dict: Literal[False],
) -> list[float] | float: ...


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
    preconditions.check_runs_eagerly("tfamp.evaluate")
    preconditions.check_compiled(model)
    preconditions.check_takes("tfamp.evaluate", model, x, y)
    preconditions.check_counts({"steps": steps, "batch_size": batch_size})
    misplaced.check_scope(model)
    strategy = model.distribute_strategy
    tensorflow_internals.separate_collectives(strategy)
    batches = data.Batches(
        x,
        y,
        sample_weight,
        strategy=strategy,
        batch_size=batch_size,
        steps=steps,
    )
    batches.warn_of_batch_size("batch_size", batch_size)
    callbacks = hooks.flattened(callbacks)
    evaluator = Evaluator(
        model,
        batches,
        keras.callbacks.CallbackList(
            swapped_averages.followed(
                hooks.callbacks_here(callbacks, strategy), model
            ),
            model=model,
            epochs=1,
            steps=batches.steps or batches.count,
            verbose=1 if verbose == "auto" else verbose,
        ),
        hooks.watch_batches(callbacks, "test"),
    )
    is_custom = type(model).test_step is not keras.Model.test_step
    with strategy.scope():
        spec = batches.dataset.element_spec
        safe.build_layers(model, spec, is_custom)
        safe.build_rest(model, spec, is_custom)
    with worker_errors():
        results = evaluator.run()
        part(strategy)
    if verbose and is_chief(strategy):
        print(format_figures(results), flush=True)
    if return_dict:
        return results
    return keras_internals.logs_in_order(model, results)


def _capped(epochs: int) -> int:
    most = keras.config.max_epochs()
    if most and most < epochs:
        warn(f"Limiting epochs to {most}")
        return most
    return epochs


def _evaluator_of(
    model: keras.Model,
    validation_data: Any,
    callbacks: keras.callbacks.CallbackList,
    *,
    batch_size: int | None,
    steps: int | None,
    watched: bool,
) -> Evaluator | None:
    if validation_data is None:
        return None
    x, y, sample_weight = data.validation_arguments(validation_data)
    batches = data.Batches(
        x,
        y,
        sample_weight,
        strategy=model.distribute_strategy,
        batch_size=batch_size,
        steps=steps,
    )
    return Evaluator(model, batches, callbacks, watched)


@contextlib.contextmanager
def _loop(
    model: keras.Model,
    element_spec: Any,
    optimizers: dict[str, LossScaleOptimizer],
    *,
    is_custom: bool,
    microbatches: int,
    jit: bool,
    plan: Plan | None,
    reports_nan: bool,
    is_told: bool,
) -> Iterator[Loop]:
    """Of a run's steps; one that was traced before where it may be."""
    strategy = model.distribute_strategy
    looks = bool(optimizers) and _looks_at_steps(strategy, is_told)
    arguments = (is_custom, microbatches, jit, plan, reports_nan)

    def make(on_trace: Callable[[], None]) -> Loop:
        return Loop(
            _step(model, optimizers, *arguments),
            strategy,
            model.run_eagerly,
            KeptStep(model, optimizers) if looks else None,
            is_narrow=precision_of(model) != "float32",
            on_trace=on_trace,
        )

    options = ("fit", element_spec, *arguments, looks, model.run_eagerly)
    with programs.lent(model, options, make) as loop:
        loop.begin()
        try:
            yield loop
        finally:
            if loop.kept is not None and programs.can_keep(model):
                loop.kept.forget()


def _step(
    model: keras.Model,
    optimizers: dict[str, LossScaleOptimizer],
    is_custom: bool,
    microbatches: int,
    jit: bool,
    plan: Plan | None,
    reports_nan: bool = False,
) -> build.Step:
    if is_custom:
        return build.custom_train_step(model, optimizers.values())
    strategy = model.distribute_strategy
    return build.train_step(
        model, strategy, microbatches, jit, plan, reports_nan
    )


def _looks_at_steps(strategy: tf.distribute.Strategy, is_told: bool) -> bool:
    """Whether each step is looked at, and not only reports.

    A TPU computes on its own: to look at each step would make it wait. So it
    would a GPU, for which that is worth it where someone is told of the step.
    """
    is_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    return not is_tpu and (is_told or not computes_on_gpus(strategy))


def _progress(
    verbose: int | str, callbacks: list[keras.callbacks.Callback]
) -> list[ProgressBar]:
    if verbose not in (0, 1, 2, "auto"):
        raise InputError(f"verbose={verbose!r}; expected 'auto', 0, 1 or 2.")
    bars = (ProgressBar, keras.callbacks.ProgbarLogger)
    if verbose == 0 or any(isinstance(each, bars) for each in callbacks):
        return []
    return [ProgressBar(one_line_per_epoch=verbose == 2)]


def _loss_scale_optimizers(
    model: keras.Model,
) -> dict[str, LossScaleOptimizer]:
    """By attribute: a model with its own `train_step` may hold several.

    And so may layers that train themselves.
    """
    found = {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, LossScaleOptimizer)
    }
    for place in walk(model):
        for name, value in vars(place.layer).items():
            is_new = all(value is not each for each in found.values())
            if isinstance(value, LossScaleOptimizer) and is_new:
                found[f"{place.path}/{name}"] = value
    return found
