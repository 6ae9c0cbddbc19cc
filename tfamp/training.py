"""`fit` and `evaluate`: any compiled Keras model, over any strategy.

The numbers are those of the global batch, whatever the number of replicas and
microbatches.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals, overflow, steps
from tfamp.callbacks import ProgressBar
from tfamp.errors import InputError
from tfamp.loss_scale import LossScaleOptimizer, wrap_optimizer
from tfamp.pace import Clock, Pace
from tfamp.precision import precision_of
from tfamp.strategy import devices_of, distribute_batches, static_rows


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
    _check_numbers(epochs, steps_per_epoch, microbatches)
    _check_compiled(model)
    strategy = model.distribute_strategy
    _check_batches(dataset, strategy, microbatches)
    is_custom = type(model).train_step is not keras.Model.train_step
    jit = _resolve_jit(jit, model, strategy, is_custom)
    if is_custom and microbatches > 1:
        raise InputError(
            f"microbatches={microbatches} needs Keras's own train_step, which "
            f"{type(model).__name__} overrides; accumulate gradients there."
        )
    with strategy.scope():
        if not is_custom:
            _make_optimizer_safe(model)
        keras_internals.build_everything(model, dataset.element_spec)
    if not model.trainable_variables:
        raise InputError(f"Model {model.name!r} has no trainable weights.")
    optimizers = _loss_scale_optimizers(model)
    for optimizer in optimizers.values():
        optimizer.all_reduce_dtype = all_reduce_dtype
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
            [*callbacks, *_progress(verbose)],
            add_history=True,
            model=model,
            epochs=epochs,
            steps=steps_per_epoch or _cardinality(dataset),
            verbose=0 if verbose == 0 else 1,
        ),
    )
    model.stop_training = False
    run.callbacks.on_train_begin()
    logs: dict[str, float] = {}
    for epoch in range(epochs):
        logs = run.epoch(epoch)
        if model.stop_training:
            break
    # The weights of a model that averages them are the averages from here on.
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
    _check_compiled(model)
    with model.distribute_strategy.scope():
        keras_internals.build_everything(model, dataset.element_spec)
    return _Evaluator(model, dataset).run(steps)


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
        self._num_steps = steps_per_epoch or _cardinality(dataset)
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
            else _Evaluator(model, validation_data)
        )

    def epoch(self, epoch: int) -> dict[str, float]:
        """Trains and evaluates for one epoch; returns its logs."""
        self._model.reset_metrics()
        self.callbacks.on_epoch_begin(epoch)
        if self._iterator is None or not self._is_continuous:
            self._iterator = iter(self._batches)
        self._watch.begin_epoch()
        self._clock.begin_epoch()
        while not self._model.stop_training:
            wanted = self._pace.steps
            if self._num_steps is not None:
                wanted = min(wanted, self._num_steps - self._clock.steps)
            if wanted == 0 or not self._graph_call(epoch, wanted):
                break
        self._check_steps_done()
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
        with _readable_errors():
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
        return _metrics_now(self._model) | self._loop.logs | self._watch.logs()

    def _check_steps_done(self) -> None:
        done = self._clock.steps
        if done == 0 and not self._model.stop_training:
            raise InputError("The dataset ended before the first batch.")
        if self._is_continuous and done < self._num_steps:
            warnings.warn(
                f"The dataset ended after {done} of {self._num_steps} steps; "
                "training stops here. Use dataset.repeat().",
                stacklevel=5,
            )
            self._model.stop_training = True
        elif self._num_steps is None:
            self.callbacks.set_params(self.callbacks.params | {"steps": done})


class _Evaluator:
    """Evaluates a model again and again with one traced function."""

    # Few enough that a graph call ends soon, many enough to hide Python.
    _STEPS_PER_LOOP = 64

    def __init__(self, model: keras.Model, dataset: tf.data.Dataset):
        _check_is_dataset(dataset)
        strategy = model.distribute_strategy
        self._model = model
        self._batches = distribute_batches(strategy, dataset)
        self._loop = steps.Loop(
            steps.evaluation_step(model), strategy, model.run_eagerly
        )

    def run(self, limit: int | None = None) -> dict[str, float]:
        self._model.reset_metrics()
        iterator = iter(self._batches)
        begin = self._loop.steps
        wanted = self._STEPS_PER_LOOP
        with _readable_errors():
            while limit is None or self._loop.steps - begin < limit:
                if limit is not None:
                    wanted = min(wanted, limit - self._loop.steps + begin)
                if not self._loop.run(iterator, wanted):
                    break
        if self._loop.steps == begin:
            raise InputError("The dataset ended before the first batch.")
        return _metrics_now(self._model) | self._loop.logs


def _metrics_now(model: keras.Model) -> dict[str, float]:
    """The metrics as they stand, over all replicas; waits for the device."""
    logs = {
        name: _python_number(value)
        for name, value in model.get_metrics_result().items()
    }
    tracker = keras_internals.loss_tracker(model)
    if tracker in model.metrics and not float(tracker.count.numpy()):
        # No batch of the epoch had a finite loss; 0 would look like success.
        logs["loss"] = float("nan")
    return logs


def _python_number(value: Any) -> Any:
    array = keras.ops.convert_to_numpy(value)
    return float(array) if array.ndim == 0 else array


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


def _progress(verbose: int | str) -> list[keras.callbacks.Callback]:
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
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # Keras's own corrupts weights when a replica but the first overflows.
        optimizer = optimizer.inner_optimizer
    keras_internals.replace_optimizer(
        model, wrap_optimizer(optimizer, precision_of(model))
    )


def _loss_scale_optimizers(
    model: keras.Model,
) -> dict[str, LossScaleOptimizer]:
    """By attribute: a model with its own `train_step` may hold several."""
    held = {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, LossScaleOptimizer)
    }
    return held


def _resolve_jit(
    jit: bool | str,
    model: keras.Model,
    strategy: tf.distribute.Strategy,
    is_custom: bool,
) -> bool:
    if jit not in (True, False, "auto"):
        raise InputError(f"jit={jit!r}; expected True, False or 'auto'.")
    obstacle = None
    if is_custom:
        obstacle = f"{type(model).__name__} overrides train_step"
    elif model.run_eagerly:
        obstacle = "the model was compiled with run_eagerly=True"
    else:
        for layer in keras_internals.all_layers(model):
            if not layer.supports_jit:
                obstacle = f"layer {layer.path} does not support XLA"
    if jit is True and obstacle:
        raise InputError(f"jit=True, but {obstacle}; pass jit=False.")
    if jit == "auto":
        has_accelerator = any(
            "GPU" in device or "TPU" in device
            for device in devices_of(strategy)
        )
        return has_accelerator and not obstacle
    return jit


def _check_numbers(
    epochs: int, steps_per_epoch: int | None, microbatches: int
) -> None:
    for name, value in {
        "epochs": epochs,
        "steps_per_epoch": steps_per_epoch,
        "microbatches": microbatches,
    }.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1.")


def _check_compiled(model: keras.Model) -> None:
    if not model.compiled:
        raise InputError(
            f"Model {model.name!r} is not compiled; call model.compile(...)."
        )


def _check_is_dataset(dataset: Any) -> None:
    if not isinstance(dataset, tf.data.Dataset):
        raise InputError(
            f"Data of type {type(dataset).__name__}; expected a "
            "tf.data.Dataset of batches, such as "
            "tf.data.Dataset.from_tensor_slices((x, y)).batch(64)."
        )


def _check_batches(
    dataset: tf.data.Dataset,
    strategy: tf.distribute.Strategy,
    microbatches: int,
) -> None:
    _check_is_dataset(dataset)
    batch_size = static_rows(dataset.element_spec)
    pieces = strategy.num_replicas_in_sync * microbatches
    if batch_size is not None and batch_size % pieces:
        raise InputError(
            f"The batch size {batch_size} is not divisible by "
            f"{strategy.num_replicas_in_sync} replicas times {microbatches} "
            f"microbatches; use {max(batch_size // pieces, 1) * pieces}."
        )


def _cardinality(dataset: tf.data.Dataset) -> int | None:
    """Batches in the dataset, or None where TensorFlow cannot tell."""
    cardinality = int(dataset.cardinality().numpy())
    if cardinality == tf.data.INFINITE_CARDINALITY:
        raise InputError(
            "The dataset repeats without end; pass steps_per_epoch."
        )
    return None if cardinality == tf.data.UNKNOWN_CARDINALITY else cardinality


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Turns TensorFlow's errors about the user's data into one line."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        for line in str(error).splitlines():
            for mark in ("tfamp input: ", "Received a label value of "):
                if mark in line:
                    text = line[line.index(mark) :].removeprefix(
                        "tfamp input: "
                    )
                    raise InputError(text.strip()) from None
        raise
