"""Every private detail of Keras that tfamp leans on, one function each.

Keras 3 has no public way to do these things. tests/test_keras_internals.py
fails when a new Keras moves one of them, before a user's training does.
"""

import contextlib
import functools
import itertools
import math
import re
import sys
import threading
import weakref
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, Literal, overload

import keras
import numpy as np
import tensorflow as tf
from packaging.version import Version


@contextlib.contextmanager
def gradients_already_reduced(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[None]:
    """Within it, the optimizer takes its gradients as they are.

    Keras optimizers sum gradients over replicas inside `apply`, after they
    clipped them. tfamp reduces first, and a second sum would multiply the
    gradient by the number of replicas.
    """
    with contextlib.ExitStack() as stack:
        for each in [optimizer, *getattr(optimizer, "optimizers", ())]:
            stack.enter_context(
                _methods_replaced(each, _all_reduce_sum_gradients=list)
            )
        yield


@contextlib.contextmanager
def schedules_on_host(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Within it, learning rates of schedules are computed on the host.

    The count of steps that they depend on is there already, and where they
    branch, no one waits for a device to say which way.
    """

    def on_host(rate):
        def computed():
            with tf.device("CPU:0"):
                return rate()

        return computed

    with contextlib.ExitStack() as stack:
        for each in single_optimizers(optimizer):
            schedule = keras.optimizers.schedules.LearningRateSchedule
            if isinstance(each._learning_rate, schedule):
                rate = on_host(each._get_current_learning_rate)
                stack.enter_context(
                    _methods_replaced(each, _get_current_learning_rate=rate)
                )
        yield


@contextlib.contextmanager
def gradients_already_clipped(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[None]:
    """Within it, the optimizer does not clip its gradients."""
    with _methods_replaced(optimizer, _clip_gradients=list):
        yield


def clipped(
    optimizer: keras.optimizers.Optimizer, gradients: Sequence[Any]
) -> list[Any]:
    """The gradients, clipped as `apply` would; None stays None."""
    present = [each for each in gradients if each is not None]
    values = iter(optimizer._clip_gradients(present))
    return [None if each is None else next(values) for each in gradients]


def global_clip_norm(optimizer: keras.optimizers.Optimizer) -> float | None:
    """The global norm that `apply` clips each gradient it gets to, or None.

    None also where gradients are summed up before they are clipped, and where
    a subclass clips in its own way.
    """
    clips_as_keras = (
        getattr(type(optimizer), "_clip_gradients", None)
        is keras.optimizers.Optimizer._clip_gradients
    )
    if (
        not clips_as_keras
        or optimizer.clipnorm
        or optimizer.gradient_accumulation_steps
        or getattr(optimizer, "optimizers", None)
    ):
        return None
    return optimizer.global_clipnorm


@contextlib.contextmanager
def update_replaced(
    optimizer: keras.optimizers.Optimizer, update: Callable
) -> Iterator[None]:
    """Within it, `apply` decays and updates each variable by `update`.

    Args:
        optimizer: no `MultiOptimizer`.
        update: called with a gradient, its `tf.Variable` and the learning
            rate, on the variable's device.
    """
    with _methods_replaced(
        optimizer,
        update_step=update,
        _apply_weight_decay=lambda variables: None,
    ):
        yield


def updates_as(
    optimizer: keras.optimizers.Optimizer,
    cls: type[keras.optimizers.Optimizer],
) -> bool:
    """Whether it updates and decays a variable by the methods of that class."""
    return all(
        getattr(type(optimizer), name) is getattr(cls, name)
        and name not in vars(optimizer)
        for name in ("update_step", "_apply_weight_decay", "_use_weight_decay")
    )


def decays(optimizer: keras.optimizers.Optimizer, variable) -> bool:
    """Whether weight decay applies to the variable."""
    return bool(optimizer.weight_decay) and optimizer._use_weight_decay(
        variable
    )


def adam_moments(
    adam: keras.optimizers.Adam, variable: tf.Variable
) -> tuple[tf.Variable, tf.Variable]:
    """First and second moment of a variable."""
    index = adam._get_variable_index(variable)
    return adam._momentums[index].value, adam._velocities[index].value


def sgd_momentum(
    sgd: keras.optimizers.SGD, variable: tf.Variable
) -> tf.Variable:
    """The momentum of a variable."""
    return sgd.momentums[sgd._get_variable_index(variable)].value


def single_optimizers(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.optimizers.Optimizer]:
    """Itself, or those that a `MultiOptimizer` holds."""
    return getattr(optimizer, "optimizers", [optimizer])


def metrics_are_kerass(model: keras.Model) -> bool:
    """Whether none of a compiled model's metrics runs anybody's own code.

    Keras's count what is no number as they count anything; those of others may
    assert that there is none.
    """
    metrics = [
        inner
        for metric in model.metrics
        for inner in [metric, *getattr(metric, "metrics", ())]
    ]
    codes = [*map(type, metrics)]
    codes += [each._fn for each in metrics if hasattr(each, "_fn")]
    return all(
        (getattr(code, "__module__", None) or "").split(".")[0] == "keras"
        for code in codes
    )


def count_in_metrics(
    model: keras.Model, y: Any, outputs: Any, sample_weight: Any
) -> None:
    """Has the metrics of a compiled model count a batch.

    `Model.compute_metrics` also computes their results, which no step reads:
    those of confusion matrices have operations that GPUs lack.
    """
    if model._compile_metrics is not None:
        model._compile_metrics.update_state(y, outputs, sample_weight)


def averaging_optimizers(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.optimizers.Optimizer]:
    """Those that keep moving averages (`use_ema`): itself, or what it holds.

    A `MultiOptimizer` keeps none; the optimizers in it may. One of those that
    got no variable is not built, and has none.
    """
    return [
        each
        for each in single_optimizers(optimizer)
        if each.use_ema and each.built
    ]


def leaves_averages(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `finalize_variable_values` puts averages in the weights' place.

    Args:
        optimizer: one with a scaler around it, or without.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return bool(averaging_optimizers(inner))


@contextlib.contextmanager
def average_overwrite_deferred(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[list[tuple[keras.optimizers.Optimizer, int]]]:
    """Yields the optimizers with an `ema_overwrite_frequency`, and that.

    Within it `apply` ignores the frequencies: Keras overwrites the weights
    with their averages in a `tf.cond` of the replica context, which fails
    under a strategy of several replicas.
    """
    frequencies = [
        (each, each.ema_overwrite_frequency)
        for each in averaging_optimizers(optimizer)
        if each.ema_overwrite_frequency
    ]
    for each, _ in frequencies:
        object.__setattr__(each, "ema_overwrite_frequency", None)
    try:
        yield frequencies
    finally:
        for each, frequency in frequencies:
            object.__setattr__(each, "ema_overwrite_frequency", frequency)


def moving_averages(
    optimizer: keras.optimizers.Optimizer,
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Pairs of a trainable variable and its moving average (`use_ema`)."""
    return [
        (variable, average)
        for variable, average in zip(
            optimizer._trainable_variables,
            optimizer._model_variables_moving_average,
            strict=True,
        )
        if average is not None
    ]


@contextlib.contextmanager
def variables_made_by(
    optimizer: keras.optimizers.Optimizer,
    make: Callable[[keras.Variable, str, Any], keras.Variable],
) -> Iterator[None]:
    """Within it, `build` makes the variables of each weight by a function.

    Args:
        optimizer: not built.
        make: takes a weight, the name of what is kept for it ("momentum"),
            and an initializer or its name.
    """

    def add(reference_variable, name=None, initializer="zeros"):
        with keras.name_scope(optimizer.name, caller=optimizer):
            variable = make(reference_variable, name or "var", initializer)
        optimizer._track_variable(variable)
        return variable

    with _methods_replaced(optimizer, add_variable_from_reference=add):
        yield


def variable_index(optimizer: keras.optimizers.Optimizer, variable) -> int:
    """The place of a variable among those that the optimizer was built with.

    Args:
        optimizer: built.
        variable: one of them, or the `tf.Variable` of a single replica.
    """
    return optimizer._get_variable_index(variable)


def overwrites_with_gradient(variable: keras.Variable) -> bool:
    """Whether the variable's "gradient" is its next value (float8 scales)."""
    return getattr(variable, "overwrite_with_gradient", False)


def add_state(
    layer: keras.layers.Layer, name: str, shape: tuple[int, ...]
) -> keras.Variable:
    """Adds float32 zeros to a built layer, whose "gradient" is the next value.

    Replicas must agree on that before it is assigned.
    """
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        variable = layer.add_weight(
            name=name,
            shape=shape,
            initializer="zeros",
            dtype="float32",
            autocast=False,
            aggregation="only_first_replica",
        )
    finally:
        if was_locked:
            layer._tracker.lock()
    variable.overwrite_with_gradient = True
    # As if the layer were being built, within what holds it.
    variable._path = f"{layer.path}/{name}"
    return variable


def build_everything(model: keras.Model, element_spec) -> None:
    """Creates all variables of a model, its metrics, loss and optimizer.

    Inside a traced distributed step it is too late for that. Keras does the
    same before its own first step. Call it in the strategy's scope.

    A model without a `call`, as a GAN whose `train_step` calls its parts, has
    nothing to be built by: it must be built already.

    Args:
        model: a compiled model.
        element_spec: specs of one batch, `(x, y, sample_weight)` or less.
    """
    if type(model).call is not keras.Model.call:
        model._symbolic_build(
            data_batch=keras.tree.map_structure(
                # The spec of a None has no shape; Keras takes the None.
                lambda spec: spec if hasattr(spec, "shape") else None,
                element_spec,
            )
        )


@contextlib.contextmanager
def additional_losses_in_float32(model: keras.Model) -> Iterator[None]:
    """Within it, losses of layers (`add_loss`) count in float32 at least.

    Keras takes them in the dtype they come in, and a float16 one cannot be
    added to the float32 loss of the outputs: a TypeError.
    """
    aggregate = model._aggregate_additional_loss

    def aggregate_in_float32(loss):
        dtype = keras.backend.result_type(loss.dtype, "float32")
        return aggregate(keras.ops.cast(loss, dtype))

    with _methods_replaced(
        model, _aggregate_additional_loss=aggregate_in_float32
    ):
        yield


# Losses of Keras's that look at all rows of a batch at once.
_ACROSS_ROWS = ("circle", "dice", "tversky")


def is_loss_of_rows(loss: Any) -> bool:
    """Whether it is a loss of Keras's that takes each row by itself."""
    makers = [type(loss), getattr(loss, "fn", type(loss))]
    return all(
        str(getattr(maker, "__module__", "")).startswith("keras.src.losses")
        and getattr(maker, "__name__", "").lower() not in _ACROSS_ROWS
        for maker in makers
    )


def unreduced_loss(
    loss: Any, y_true, y_pred, sample_weight
) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor | None, bool] | None:
    """What `Loss.__call__` computes, up to where it would reduce.

    Returns:
        The losses times their weights, masked ones 0; those weights or None;
        the mask or None; and whether the loss itself was a single number.
        None for what has a `__call__` of its own.
    """
    if (
        not isinstance(loss, keras.losses.Loss)
        or type(loss).__call__ is not keras.losses.Loss.__call__
    ):
        return None

    def cast(value):
        return keras.ops.convert_to_tensor(value, dtype=loss.dtype)

    masks = [mask_of(y_pred)]
    values = loss.call(
        keras.tree.map_structure(cast, y_true),
        keras.tree.map_structure(cast, y_pred),
    )
    masks.append(mask_of(values))
    masks = [mask for mask in masks if mask is not None]
    mask = masks[0] & masks[1] if len(masks) == 2 else (masks or [None])[0]
    values = cast(values)
    is_scalar = values.shape.rank == 0
    values, weights = weighted_values(
        values,
        None if sample_weight is None else cast(sample_weight),
        None if mask is None else cast(mask),
    )
    return values, weights, mask, is_scalar


@contextlib.contextmanager
def loss_terms_replaced(
    model: keras.Model, leaf: Callable, add: Callable, count: Callable
) -> Iterator[None]:
    """Within it, `compute_loss` makes its terms by other functions.

    None of them is divided by the number of replicas.

    Args:
        model: compiled and built.
        leaf: takes a loss of `compile`, labels, outputs and weights.
        add: takes a loss of `add_loss` or of a regularizer.
        count: takes the metric of a single output, and its loss.
    """

    def add_in_float32(loss):
        dtype = keras.backend.result_type(loss.dtype, "float32")
        return add(keras.ops.cast(loss, dtype))

    before = vars(model).get("_aggregate_additional_loss")
    object.__setattr__(model, "_aggregate_additional_loss", add_in_float32)
    losses = model._compile_loss
    # A `compute_loss` of the model's own may leave it alone, and unbuilt.
    losses = losses if losses is not None and losses.built else None
    saved = {}
    if losses is not None:
        saved = {
            name: vars(losses)[name] for name in ("_flat_losses", "_metrics")
        }
        losses._flat_losses = [
            each._replace(loss=functools.partial(leaf, each.loss))
            for each in losses._flat_losses
        ]
        losses._metrics = [
            _Counted(functools.partial(count, each)) for each in losses._metrics
        ]
    try:
        yield
    finally:
        if losses is not None:
            vars(losses).update(saved)
        if before is None:
            object.__delattr__(model, "_aggregate_additional_loss")
        else:
            object.__setattr__(model, "_aggregate_additional_loss", before)


class _Counted:
    """Stands in for the metric of a single output."""

    def __init__(self, count: Callable):
        self._count = count

    def update_state(self, value, sample_weight=None) -> None:
        del sample_weight
        # Keras has multiplied by what it believes it divided by.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self._count(value / replicas)


class _OfThreads:
    """A function that threads may each replace for themselves.

    Of a module or a class. Other threads are given its own meanwhile, and
    where no thread has another one any more it is as it was.
    """

    def __init__(self, owner: Any, name: str):
        self._owner, self._name = owner, name
        self._lock = threading.Lock()
        self._uses = 0
        self._thread = threading.local()
        self._own = vars(owner)[name]

        @functools.wraps(self._own)
        def called(*args, **kwargs):
            replacements = vars(self._thread).get("replacements")
            function = replacements[-1] if replacements else self._own
            return function(*args, **kwargs)

        self._called = called
        # For those who look for what stands behind a function.
        called.tfamp_stands_for = self._own  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def replaced(self, function: Callable) -> Iterator[Callable]:
        """Within it this thread calls `function`; yields the owner's own."""
        replacements = vars(self._thread).setdefault("replacements", [])
        with self._lock:
            if self._uses == 0:
                self._own = vars(self._owner)[self._name]
                setattr(self._owner, self._name, self._called)
            self._uses += 1
        replacements.append(function)
        try:
            yield self._own
        finally:
            # Not always the last: generators may end in any order.
            replacements.remove(function)
            with self._lock:
                self._uses -= 1
                is_ours = vars(self._owner)[self._name] is self._called
                if self._uses == 0 and is_ours:
                    setattr(self._owner, self._name, self._own)


@functools.cache
def _of_threads(owner: Any, name: str) -> _OfThreads:
    return _OfThreads(owner, name)


def own_function(function: Callable) -> Callable:
    """What a function is when no thread replaces it."""
    return getattr(function, "tfamp_stands_for", function)


@contextlib.contextmanager
def sparse_cross_entropy_replaced(function: Callable) -> Iterator[None]:
    """Within it, this thread's losses of integer labels compute by this.

    Keras checks shapes and casts, then calls TensorFlow by its public name,
    which is therefore what is replaced.

    Args:
        function: takes `labels` and `logits` as
            `tf.nn.sparse_softmax_cross_entropy_with_logits`.
    """
    name = "sparse_softmax_cross_entropy_with_logits"
    with _of_threads(tf.nn, name).replaced(function):
        yield


@contextlib.contextmanager
def losses_of_replica_replaced(
    scale: Callable, unscale: Callable, reduce: Callable
) -> Iterator[None]:
    """Within it, this thread's losses are scaled and reduced by functions.

    Args:
        scale: takes a mean, in the place of dividing it by the number of
            replicas.
        unscale: undoes that.
        reduce: takes Keras's own function, which reduces losses and scales
            means, and its arguments: losses, weights, mask, reduction, dtype.
    """
    module = keras.src.losses.loss
    own = vars(module)["reduce_weighted_values"]
    with contextlib.ExitStack() as stack:
        for name, function in (
            ("scale_loss_for_distribution", scale),
            ("unscale_loss_for_distribution", unscale),
            (
                "reduce_weighted_values",
                functools.partial(reduce, own_function(own)),
            ),
        ):
            stack.enter_context(_of_threads(module, name).replaced(function))
        yield


@contextlib.contextmanager
def gradient_sums_replaced(function: Callable) -> Iterator[None]:
    """Within it, this thread's optimizers sum gradients over replicas by this.

    Args:
        function: takes Keras's own, the optimizer, and pairs of gradients and
            variables.
    """
    owner = keras.src.backend.tensorflow.optimizer.TFOptimizer
    own = own_function(vars(owner)["_all_reduce_sum_gradients"])
    with _of_threads(owner, "_all_reduce_sum_gradients").replaced(
        functools.partial(function, own)
    ):
        yield


@contextlib.contextmanager
def divisions_noted(noted: list[tf.Tensor]) -> Iterator[None]:
    """Within it, `noted` gets what Keras makes ready to add up over replicas.

    Sums of its losses, and means that it divides by their number.
    """
    module = keras.src.losses.loss
    own_scale = own_function(vars(module)["scale_loss_for_distribution"])
    own_reduce = own_function(vars(module)["reduce_weighted_values"])

    def scale(value):
        noted.append(tf.identity(own_scale(value)))
        return noted[-1]

    def reduce(values, *args, **kwargs):
        reduced = own_reduce(values, *args, **kwargs)
        if len(values.shape) == 0:
            # Reduced by the user.
            return reduced
        noted.append(tf.identity(reduced))
        return noted[-1]

    with (
        _of_threads(module, "scale_loss_for_distribution").replaced(scale),
        _of_threads(module, "reduce_weighted_values").replaced(reduce),
    ):
        yield


@contextlib.contextmanager
def assignments_noted(
    note: Callable[[keras.Variable], None],
) -> Iterator[None]:
    """Within it, `note` gets each variable that this thread assigns to.

    Before it does, by whichever method of `keras.Variable`.
    """
    cls = keras.src.backend.common.variables.Variable
    own = own_function(vars(cls)["assign"])

    def assign(variable, value):
        note(variable)
        return own(variable, value)

    with _of_threads(cls, "assign").replaced(assign):
        yield


def weighted_values(
    values: tf.Tensor, sample_weight: Any, mask: Any
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Losses times their weights, masked ones 0; and those weights or None."""
    module = keras.src.losses.loss
    # "sum" keeps the mask from being scaled by what counts here.
    weights = module.apply_mask(
        sample_weight, mask, dtype=values.dtype, reduction="sum"
    )
    if weights is not None:
        weights = keras.ops.cast(weights, values.dtype)
        values, weights = module.squeeze_or_expand_to_same_rank(values, weights)
        values = values * weights
    return values, weights


def graph_function(function: Callable, *, relaxes: bool = False) -> Callable:
    """A `tf.function` whose traces are counted by themselves.

    TensorFlow counts them by the code that is traced, whatever it closes over,
    and warns of the fifth: of five models, or five calls of `fit`. What has no
    code, as a partial, is counted alone.

    Args:
        function: any, of the caller's own; it is not converted by AutoGraph.
        relaxes: whether a second shape makes that axis unknown.
    """
    return tf.function(
        functools.partial(function), autograph=False, reduce_retracing=relaxes
    )


# What no later trace reads of a model or a layer: what fits, evaluations and
# calls set, while they run and for good; and books that are kept of the rest.
UNREAD_BY_TRACES = frozenset(
    {
        "_aggregate_additional_loss",
        "history",
        "stop_training",
        "stop_evaluating",
        "stop_predicting",
        "train_function",
        "test_function",
        "predict_function",
        "_losses",
        "_auto_config",
        "_build_shapes_dict",
        "_inbound_nodes",
        "_nodes",
        "_nodes_by_depth",
        "_operations_by_depth",
        "_outbound_nodes",
        "_self_unconditional_checkpoint_dependencies",
        "_self_unconditional_dependency_names",
        "_self_unconditional_deferred_dependencies",
        "_self_update_uid",
        "_tracker",
    }
)


# What joins the layers of a functional model: made once, and never changed.
JOINTS = (keras.KerasTensor, keras.src.ops.node.Node)


def initial_epoch(model: keras.Model) -> int:
    """The epoch to begin with: `BackupAndRestore` found the ones before."""
    return model._initial_epoch or 0


def forget_initial_epoch(model: keras.Model) -> None:
    """As if `BackupAndRestore` had found nothing."""
    model._initial_epoch = None


def last_of_execution(model: keras.Model, begin: int, end: int) -> int:
    """The batch that callbacks are told a graph call ended with.

    Keras counts an execution (`compile(steps_per_execution=...)`) that the
    end of the data cut short as whole.

    Args:
        model: compiled or not.
        begin: the first batch of the call.
        end: the one after its last.
    """
    whole = model.steps_per_execution
    return (begin + whole if whole > 1 else end) - 1


def renormalizes(layer: keras.layers.BatchNormalization) -> bool:
    """Whether it renormalizes batches, which Keras before 3.14 never does."""
    return getattr(layer, "renorm", False)


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """The mean that a compiled model reports as `loss`."""
    return model._loss_tracker


def replace_optimizer(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    saved: keras.optimizers.Optimizer | None = None,
) -> None:
    """Gives a compiled model another optimizer, also in what it saves.

    Args:
        model: the model.
        optimizer: the one that trains it.
        saved: the one that files name; None for the same.
    """
    model.optimizer = optimizer
    model._compile_config.config["optimizer"] = saved or optimizer


def state_of_scaler(
    store: Mapping[str, Any], inner: keras.optimizers.Optimizer
) -> tuple[Any, Any, dict[str, Any]] | None:
    """What Keras's `LossScaleOptimizer` saved; None for anything else.

    Returns:
        The scale, the clean steps since it moved, and the state of the inner
        optimizer as that one would have saved it.
    """
    # Its iterations and learning rate, which it does not use, come first.
    own = ("iterations", "learning_rate", "step_counter", "dynamic_scale")
    count = len(inner.variables)
    if len(store.keys()) != len(own) + count:
        return None
    state = {str(i): store[str(i + len(own))] for i in range(count)}
    return store["3"], store["2"], state


def is_saving_model() -> bool:
    """Whether a model's config is being written into a file."""
    attribute = "shared_objects/id_to_obj_map"
    state = keras.src.backend.common.global_state
    return state.get_global_attribute(attribute) is not None


def mask_of(tensor):
    """The mask that a layer attached to its output, or None.

    It is an attribute of the Python object, so that a `tf.function` loses it.
    """
    return getattr(tensor, "_keras_mask", None)


def attach_mask(tensor, mask) -> None:
    """Attaches a mask as a layer would."""
    if mask is not None:
        tensor._keras_mask = mask


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that a layer holds itself, not those that they hold.

    `Model.layers` is public, but a layer that is no model has no such list.
    """
    return layer._flatten_layers(include_self=False, recursive=False)


def run_symbolically(function: Callable, *args, **kwargs) -> None:
    """Calls a function on placeholders in place of its `KerasTensor`s.

    Layers run their real `call`, so that tensors have the dtypes they will
    have in training; `compute_output_spec` of a functional model instead
    repeats the dtypes of the day it was built. Variables and seeds keep their
    values.
    """
    keras.src.backend.compute_output_spec(function, *args, **kwargs)


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The model and all layers in it, at any depth, each once."""
    return model._flatten_layers()


# Keras 3.10 has it in the dtype of its input.
RMS_NORMALIZATION_IS_FLOAT32 = Version(keras.__version__) >= Version("3.11")

# Keras has a name for it since 3.13.
_GLOBAL_SEED_GENERATOR = "global_seed_generator"


@overload
def global_seed_generator(
    create: Literal[True],
) -> keras.random.SeedGenerator: ...


@overload
def global_seed_generator(
    create: bool,
) -> keras.random.SeedGenerator | None: ...


def global_seed_generator(create: bool) -> keras.random.SeedGenerator | None:
    """What `keras.random` draws from without a seed.

    Args:
        create: whether to make it where nothing has drawn from it yet; else
            the result is None there.
    """
    if create:
        return keras.src.random.seed_generator.global_seed_generator()
    return keras.src.backend.common.global_state.get_global_attribute(
        _GLOBAL_SEED_GENERATOR
    )


@contextlib.contextmanager
def additional_losses_kept(
    layers: Sequence[keras.layers.Layer],
) -> Iterator[None]:
    """Gives back what `add_loss` recorded before, and not what it did within.

    A call of a layer clears the losses of the call before.
    """
    before = [(each, each._losses[:], set(each._loss_ids)) for each in layers]
    try:
        yield
    finally:
        for each, losses, ids in before:
            each._losses[:] = losses
            each._loss_ids.clear()
            each._loss_ids.update(ids)


@contextlib.contextmanager
def build_state_kept(layers: Sequence[keras.layers.Layer]) -> Iterator[None]:
    """Gives back what layers say of having been built and called."""
    names = ("built", "_called", "_build_shapes_dict")
    before = [
        {name: vars(each)[name] for name in names if name in vars(each)}
        for each in layers
    ]
    try:
        yield
    finally:
        for each, values in zip(layers, before, strict=True):
            for name in names:
                vars(each).pop(name, None)
            vars(each).update(values)


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What `compile` was called with, as objects, by argument."""
    return dict(model._compile_config.config)


def asked_to_jit(model: keras.Model) -> bool | None:
    """What `compile(jit_compile=...)` was told; None for "auto".

    Keras keeps only what "auto" became. Told the same, it is as if it had not
    been told; under a strategy "auto" becomes False.
    """
    resolved = model._resolve_auto_jit_compile() and not model.run_eagerly
    return None if model.jit_compile == resolved else bool(model.jit_compile)


@contextlib.contextmanager
def loss_and_metrics_unbuilt(model: keras.Model) -> Iterator[None]:
    """Within it, the first use of loss and metrics builds copies of them.

    Keras builds them from the first batch: metrics given by name come into
    being then. What looks at a model must not leave that behind.
    """
    arguments = compile_arguments(model)
    names = getattr(model, "output_names", None)
    module = keras.src.trainers.compile_utils
    copies = {}
    if model._compile_loss is not None and not model._compile_loss.built:
        copies["_compile_loss"] = module.CompileLoss(
            arguments["loss"], arguments["loss_weights"], output_names=names
        )
    metrics = model._compile_metrics
    if metrics is not None and not metrics.built:
        copies["_compile_metrics"] = module.CompileMetrics(
            arguments["metrics"],
            arguments["weighted_metrics"],
            output_names=names,
        )
    # Past Layer.__setattr__, which would track the copies.
    originals = {name: vars(model)[name] for name in copies}
    vars(model).update(copies)
    try:
        yield
    finally:
        vars(model).update(originals)


def forget_global_seed_generator() -> None:
    """Undoes its making: the next draw without a seed makes it anew."""
    keras.src.backend.common.global_state.set_global_attribute(
        _GLOBAL_SEED_GENERATOR, None
    )


def optimized_variables(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """What an optimizer was built with, and moves where it is told nothing."""
    return optimizer._trainable_variables


@contextlib.contextmanager
def dtype_policy_replaced(
    layers: list[keras.layers.Layer], policy: keras.dtype_policies.DTypePolicy
) -> Iterator[None]:
    """Within it the layers have another dtype policy.

    The public setter would write into a `DTypePolicyMap`, which other layers
    share, and could not be undone. A layer whose kernel is integers still
    takes it so.
    """
    own = [layer._dtype_policy for layer in layers]
    for layer in layers:
        new = _of_integers(layer, policy) or policy
        object.__setattr__(layer, "_dtype_policy", new)
    try:
        with _constants_cast(layers):
            yield
    finally:
        for layer, each in zip(layers, own, strict=True):
            object.__setattr__(layer, "_dtype_policy", each)


def _of_integers(
    layer: keras.layers.Layer, policy: keras.dtype_policies.DTypePolicy
) -> keras.dtype_policies.DTypePolicy | None:
    if layer.quantization_mode in (None, "float8"):
        return None
    kind = layer.dtype_policy.name.partition("_from_")[0]
    return keras.dtype_policies.get(f"{kind}_from_{policy.name}")


@contextlib.contextmanager
def _constants_cast(layers: list[keras.layers.Layer]) -> Iterator[None]:
    """Within it constants that layers hold have their compute dtype.

    Normalization casts its mean and variance once, when they are known.
    """
    casting = [
        (layer, layer.mean, layer.variance)
        for layer in layers
        if isinstance(layer, keras.layers.Normalization)
        and getattr(layer, "mean", None) is not None
        and layer.mean.dtype != layer.compute_dtype
    ]
    for layer, *_ in casting:
        if layer.input_mean is None:
            layer.finalize_state()
        else:
            layer.build(layer._build_input_shape)
    try:
        yield
    finally:
        for layer, mean, variance in casting:
            layer.mean, layer.variance = mean, variance


# Where TensorFlow calls a function with a gradient of its own.
CUSTOM_GRADIENT_CALLS = ("_eager_mode_decorator", "_graph_mode_decorator")


def backend_modules() -> list:
    """The modules whose functions `keras.ops` and `keras.random` call."""
    backend = keras.src.backend.tensorflow
    return [
        backend.core,
        backend.image,
        backend.linalg,
        backend.math,
        backend.nn,
        backend.numpy,
        backend.random,
    ]


def casts_of_keras() -> list[tuple[Any, str]]:
    """What Keras itself casts by, as a layer its inputs, by owner and name."""
    backend = keras.src.backend
    return [(backend, "cast"), (backend, "convert_to_tensor")]


def casts_of_users() -> list[tuple[Any, str]]:
    """What the code of a layer casts by, before dtypes become names."""
    ops = keras.src.ops
    return [
        (owner, name)
        for owner in (keras.ops, ops, ops.core)
        for name in ("cast", "convert_to_tensor")
    ]


def gradient_functions() -> list[tuple[Any, str]]:
    """What runs gradients of operations, by owner and name."""
    module = sys.modules["tensorflow.python.ops.custom_gradient"]
    return [
        (tf.GradientTape, "gradient"),
        (tf.GradientTape, "jacobian"),
        (tf.GradientTape, "batch_jacobian"),
        (tf, "gradients"),
        *((module, name) for name in CUSTOM_GRADIENT_CALLS),
    ]


@contextlib.contextmanager
def differentiated_within() -> Iterator[None]:
    """Around all of a trace: what is traced is not differentiated later.

    TensorFlow makes a record wherever a function with a gradient of its own is
    traced, and never drops it, nor the graph that it holds. Here it is dropped.
    """
    yield
    if tf.executing_eagerly():
        return
    graph = tf.compat.v1.get_default_graph()
    module = sys.modules["tensorflow.python.framework.ops"]
    records = module.gradient_registry._registry
    # Copied in one step: while a list of pairs grows, garbage may be collected,
    # and in that another thread may add a record.
    for name, record in dict(records).items():
        if (
            name.startswith("CustomGradient-")
            and _traced_in(record["type"]) is graph
        ):
            records.pop(name, None)


def _traced_in(gradient: Callable) -> tf.Graph | None:
    """The graph of a function, loops and branches included, of a record."""
    module = sys.modules["tensorflow.python.ops.control_flow_v2_func_graphs"]
    for computing in _closed_over(gradient):
        for value in tf.nest.flatten(_closed_over(computing)):
            if isinstance(value, tf.Tensor) and hasattr(value, "graph"):
                graph = value.graph
                while isinstance(graph, module.ControlFlowFuncGraph):
                    graph = graph.outer_graph
                return graph
    return None


def _closed_over(function: Any) -> list[Any]:
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells]


def storing_functions() -> list[tuple[Any, str]]:
    """What stores tensors in something of one dtype, by owner and name."""
    module = sys.modules["tensorflow.python.ops.resource_variable_ops"]
    # The second has some of the first's, wrapped.
    classes = (module.BaseResourceVariable, module.ResourceVariable)
    return [
        *(
            (each, name)
            for each in classes
            for name in ("assign", "assign_add", "assign_sub")
            if name in vars(each)
        ),
        *((tf.TensorArray, name) for name in ("write", "unstack", "scatter")),
    ]


# What calls a `tf.function`.
TRACED_CALL: tuple[Any, str] = (
    sys.modules[
        "tensorflow.python.eager.polymorphic_function.polymorphic_function"
    ].Function,
    "__call__",
)


def applying_functions() -> list[tuple[Any, str]]:
    """What updates variables by gradients, by owner and name."""
    base = keras.src.optimizers.base_optimizer.BaseOptimizer
    return [(base, "apply"), (keras.optimizers.LossScaleOptimizer, "apply")]


# The cell of `ConvLSTM1D` and its like, which has no public name.
ConvLSTMCell = keras.src.layers.rnn.conv_lstm.ConvLSTMCell


def autocast_scope(dtype: str) -> contextlib.AbstractContextManager:
    """Within it, float variables are read in that dtype, as in a layer."""
    return keras.src.backend.common.variables.AutocastScope(dtype)


def autocast_dtype() -> str | None:
    """The dtype that float variables are read in here; None for their own."""
    scope = keras.src.backend.common.variables.get_autocast_scope()
    return scope and scope.dtype


@contextlib.contextmanager
def reads_noted(
    variables: Sequence[keras.Variable],
    note: Callable[[keras.Variable], None],
) -> Iterator[None]:
    """Within it, a function is called each time that one of them is read."""

    def noting(cls: Any) -> type:
        def value(self):
            note(self)
            return cls.value.fget(self)

        return type(cls.__name__, (cls,), {"value": property(value)})

    before = [type(variable) for variable in variables]
    classes = {cls: noting(cls) for cls in set(before)}
    try:
        for variable, cls in zip(variables, before, strict=True):
            variable.__class__ = classes[cls]
        yield
    finally:
        for variable, cls in zip(variables, before, strict=True):
            variable.__class__ = cls


def is_compiled_by_xla() -> bool:
    """Whether what is traced here is for XLA: `jit_compile`, or a TPU."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        scope = graph._get_control_flow_context()
        while scope is not None:
            if scope.IsXLAContext():
                return True
            scope = scope.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


def in_stateless_scope() -> bool:
    """Whether variables have values given to them for a while."""
    return keras.src.backend.common.stateless_scope.in_stateless_scope()


def stored(variable: keras.Variable) -> tf.Variable:
    """What a variable is kept in, whatever it is read as."""
    return variable._value


def replace_value(
    variable: keras.Variable, value: tf.Variable, cls: type
) -> None:
    """Gives a variable another `tf.Variable`, and the methods of a class.

    Its dtype stays the one that it was declared with.
    """
    variable._value = value
    variable.__class__ = cls


def uncast_value(variable: keras.Variable) -> tf.Tensor:
    """The value of a variable as it is stored, also inside a 16-bit layer."""
    with keras.src.backend.common.variables.AutocastScope(None):
        return tf.convert_to_tensor(variable.value)


@contextlib.contextmanager
def _methods_replaced(instance: Any, **methods: Callable) -> Iterator[None]:
    # A method that a user set on the instance is put back.
    own = {
        name: vars(instance)[name] for name in methods.keys() & vars(instance)
    }
    for name, method in methods.items():
        object.__setattr__(instance, name, method)
    try:
        yield
    finally:
        for name in methods:
            if name in own:
                object.__setattr__(instance, name, own[name])
            else:
                object.__delattr__(instance, name)


def quantize(
    model: keras.Model, kind: str, keep: Iterable[keras.layers.Layer]
) -> None:
    """Keras's `quantize`, but of some layers.

    Keras takes a filter since 3.13 only.
    """
    with contextlib.ExitStack() as stack:
        for layer in keep:
            stack.enter_context(
                _methods_replaced(layer, quantize=lambda *_, **__: None)
            )
        model.quantize(kind)
    _tell_of_sublayers(model)


def quantize_with_gptq(
    model: keras.Model,
    keep: Collection[keras.layers.Layer],
    run: Callable[[], object],
) -> None:
    """Keras's GPTQ, in 4 bits, of the dense layers of any model.

    Keras itself takes chains of blocks on token ids alone, reads the inputs
    of a layer's `call` when it is no longer called, corrects too much, and
    spoils rows of one sign.

    Args:
        model: whose layers are changed.
        keep: layers that stay as they are.
        run: calls the model on what its layers are to be fitted to.
    """
    module = keras.src.quantizers.gptq
    config = keras.quantizers.GPTQConfig(None, None, group_size=128)
    fits = [
        (layer, module.GPTQ(layer, config))
        for layer in model._flatten_layers()
        if layer not in keep and _is_fitted_by_gptq(layer)
    ]
    with contextlib.ExitStack() as stack:
        for layer, fit in fits:
            stack.enter_context(
                _methods_replaced(layer, call=_told(layer.call, fit))
            )
        run()
    for layer, fit in fits:
        layer.quantize("gptq", config=config)
        factor = _factor_of_inverse(np.asarray(fit.hessian, "float64"))
        with _methods_replaced(
            module,
            gptq_quantize_matrix=_mended(module.gptq_quantize_matrix, factor),
        ):
            fit.quantize_and_correct_layer()
    _tell_of_sublayers(model)


def _mended(quantize_matrix: Callable, factor: np.ndarray) -> Callable:
    def mended(weights, inv_hessian, compute_scale_zero, **options):
        del inv_hessian, compute_scale_zero
        return quantize_matrix(
            weights,
            inv_hessian=keras.ops.cast(factor, "float32"),
            compute_scale_zero=_scale_and_zero,
            **options,
        )

    return mended


def _scale_and_zero(weights: tf.Tensor) -> tuple:
    """What 0 to 15 stand for, by row.

    Without 0 among it a row of one sign would have a negative number stand
    for 0, which Keras stores as a positive one.
    """
    array = np.asarray(weights, "float32")
    low = np.minimum(array.min(1, keepdims=True), 0)
    span = np.maximum(array.max(1, keepdims=True), 0) - low
    scale = np.where(span == 0, 1, span) / np.float32(15)
    zero = np.round(-low / scale)
    tensor = keras.ops.convert_to_tensor
    return tensor(scale, "float32"), tensor(zero, "uint8"), 15.0


# Of the mean of the diagonal, as Keras has it.
_DAMPING = 0.01


def _factor_of_inverse(hessian: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse (Frantar et al. 2022, 3.3).

    Its rows are those of the inverses of what is left after each row is
    rounded. Keras takes the first inverse for all, and corrects too much.
    """
    diagonal = np.diag(hessian).copy()
    diagonal[diagonal == 0] = 1
    damped = hessian.copy()
    np.fill_diagonal(damped, diagonal + _DAMPING * diagonal.mean())
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def lost_at_saving(model: keras.Model) -> list[int]:
    """Which of `all_layers` are quantized, and would be loaded as plain ones.

    A layer that makes others itself, and gives them no policy, has such.
    """
    lost = set()
    for layer in _making_others(model):
        try:
            again = type(layer).from_config(layer.get_config())
            again.build_from_config(layer.get_build_config())
            modes = {
                each.path: each.quantization_mode
                for each in again._flatten_layers()
            }
        except Exception:
            modes = {}
        lost |= {
            each
            for each in layer._flatten_layers(include_self=False)
            if each.quantization_mode != modes.get(each.path)
        }
    return [i for i, each in enumerate(all_layers(model)) if each in lost]


def _making_others(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The outermost layers whose sublayers no config lists."""
    if isinstance(layer, (keras.Sequential, Functional)):
        return [one for each in layer.layers for one in _making_others(each)]
    return [layer] if sublayers(layer) else []


def _tell_of_sublayers(model: keras.Model) -> None:
    """Has configs say how the layers in a layer are quantized.

    As Keras advises in `DTypePolicyMap`; its own attention does not.
    """
    for layer in _making_others(model):
        policies = {
            each.path: each.dtype_policy
            for each in layer._flatten_layers(include_self=False)
            if each.quantization_mode
        }
        if policies:
            policy = keras.dtype_policies.DTypePolicyMap(
                layer.dtype_policy, policies
            )
            object.__setattr__(layer, "_dtype_policy", policy)


@contextlib.contextmanager
def saved_whole(model: keras.Model) -> Iterator[None]:
    """Within it a model that GPTQ quantized is saved as it can be loaded.

    Keras 3.15 leaves out the numbers that stand for 0.
    """
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if layer.quantization_mode == "gptq":
                save = functools.partial(_save_gptq_variables, layer)
                stack.enter_context(
                    _methods_replaced(layer, save_own_variables=save)
                )
        yield


def _save_gptq_variables(layer: keras.layers.Layer, store: dict) -> None:
    names = layer.variable_serialization_spec["gptq"]
    values = [getattr(layer, name) for name in names]
    there = [value for value in values if value is not None]
    for i, value in enumerate(there):
        store[str(i)] = value


def _told(call: Callable, fit: Any) -> Callable:
    def told(inputs, *args, **kwargs):
        fit.update_hessian_with_batch(
            keras.ops.reshape(inputs, (-1, int(fit.rows)))
        )
        return call(inputs, *args, **kwargs)

    return told


def _is_fitted_by_gptq(layer: keras.layers.Layer) -> bool:
    """Whether Keras knows which axes of a kernel are the rows of a matrix."""
    if type(layer) is keras.layers.Dense:
        return True
    if type(layer) is not keras.layers.EinsumDense or layer.kernel.ndim > 3:
        return False
    inputs, kernel, outputs = re.split(",|->", layer.equation)
    summed = "".join(letter for letter in kernel if letter not in outputs)
    # Keras goes by which axis is the longest one.
    rows = keras.src.quantizers.gptq.GPTQ(layer).rows
    return (
        bool(summed)
        and kernel.startswith(summed)
        and inputs.endswith(summed)
        and not set(kernel.removeprefix(summed)) & set(inputs)
        and int(rows) == math.prod(layer.kernel.shape[: len(summed)])
    )


def data_adapter(
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    batch_size: int | None,
    steps: int | None,
    shuffle: bool | str,
    class_weight: dict[int, float] | None,
) -> Any:
    """What makes batches of all that `Model.fit` takes.

    That `shuffle` says nothing of most kinds is no reason to warn: it is the
    default.
    """
    adapters = keras.src.trainers.data_adapters
    is_shuffled = adapters.array_data_adapter.can_convert_arrays(
        (x, y, sample_weight)
    ) or getattr(x, "num_batches", None)
    return adapters.get_data_adapter(
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        steps_per_epoch=steps,
        shuffle=shuffle if is_shuffled else False,
        class_weight=class_weight,
    )


def train_validation_split(arrays: Any, validation_split: float) -> Any:
    """The first rows of arrays, and the last, as `Model.fit` splits them."""
    return (
        keras.src.trainers.data_adapters.array_slicing.train_validation_split(
            arrays, validation_split=validation_split
        )
    )


def seed_dtype() -> str:
    """The dtype of what `keras.random` draws from."""
    return keras.src.backend.random_seed_dtype()


def has_global_seed() -> bool:
    """Whether TensorFlow draws from a seed that was set."""
    from tensorflow.python.eager import context

    return context.global_seed() is not None


def first_of_generator(adapter: Any) -> Any:
    """The first batch, where a data adapter was made of a Python generator.

    Keras has taken it to see what it is, and puts it before the others.
    """
    return adapter._first_batches[0]


def is_array_adapter(adapter: Any) -> bool:
    """Whether a data adapter holds arrays."""
    module = keras.src.trainers.data_adapters.array_data_adapter
    return isinstance(adapter, module.ArrayDataAdapter)


def profiles_batches(callback: keras.callbacks.TensorBoard) -> bool:
    """Whether `profile_batch` was given to it."""
    return callback._start_batch > 0


def concatenate_outputs(pieces: list[Any]) -> Any:
    """Outputs of batches, one after the other, as `Model.predict` does.

    Ragged where the batches differ in more than their rows; scalars in a row.
    """
    module = keras.src.backend.tensorflow.trainer
    whole = module.potentially_ragged_concat(pieces)
    return module.convert_to_np_if_not_ragged(whole)


def logs_in_order(model: keras.Model, logs: dict[str, Any]) -> Any:
    """The logs as `Model.evaluate` returns them without `return_dict`."""
    return model._flatten_metrics_in_order(logs)


def is_made_in_scope(model: keras.Model) -> bool:
    """Whether the model was made within a `strategy.scope()`."""
    return model._distribute_strategy is not None


def input_dtype(model: keras.Layer) -> str | None:
    """What a Sequential casts its inputs to; None for what is none.

    A Sequential without an Input of its own gets one in the compute dtype of
    its first layer, so that ids and raw columns are rounded before that layer.
    """
    if not isinstance(model, keras.Sequential) or not model.built:
        return None
    functional = model._functional
    return None if functional is None else functional._inputs[0].dtype


def set_input_dtype(model: keras.Sequential, dtype: str) -> None:
    """Sets it. The tensor reads it at each call, the layer tells it a file."""
    tensor = model._functional._inputs[0]
    tensor._dtype = tensor._keras_history.operation._dtype = dtype


def mark(model: keras.Model, name: str) -> None:
    """Notes on a model that something was done; no file keeps the note."""
    object.__setattr__(model, f"_{name}", True)


def is_marked(model: keras.Model, name: str) -> bool:
    """Whether `mark` noted that."""
    return getattr(model, f"_{name}", False)


def mark_session(value: Any) -> None:
    """Leaves a mark that `keras.backend.clear_session()` wipes off."""
    keras.src.backend.common.global_state.set_global_attribute(
        "tfamp_mark", value
    )


def session_mark() -> Any:
    """The mark that `mark_session` left, or None."""
    return keras.src.backend.common.global_state.get_global_attribute(
        "tfamp_mark"
    )


def symbolic_batch(element_spec: Any) -> Any:
    """Placeholders of a batch, for `run_symbolically`."""
    return keras.tree.map_structure(
        lambda spec: (
            keras.KerasTensor(
                spec.shape, keras.backend.standardize_dtype(spec.dtype)
            )
            if hasattr(spec, "shape")
            else None
        ),
        element_spec,
    )


def build_layers(model: keras.Model, element_spec: Any) -> None:
    """Creates the variables of a model's layers, where they are missing."""
    if all(layer.built for layer in model._flatten_layers()):
        return
    x, _, _ = keras.utils.unpack_x_y_sample_weight(symbolic_batch(element_spec))
    keras.src.backend.compute_output_spec(model, x, training=False)


def build_optimizer(model: keras.Model) -> None:
    """Creates the variables of a model's optimizer, where they are missing."""
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


# A model that is a graph of operations, of which Keras has no public name.
Functional = keras.src.models.functional.Functional


def graph_steps(model: keras.Model) -> list[tuple[str, Any]]:
    """The names of what a functional model calls, in order, and the results.

    Results are symbolic, in the structure in which they are returned.
    """
    graph = getattr(model, "_functional", None) or model
    by_depth = getattr(graph, "_nodes_by_depth", {})
    return [
        (node.operation.name, node.outputs)
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if not node.is_input
    ]


def graph_inputs(model: keras.Model) -> Any:
    """The symbolic inputs of a functional model, as they were given."""
    graph = getattr(model, "_functional", None) or model
    return getattr(graph, "_inputs_struct", None)


def graph_operations(model: keras.Model) -> list:
    """The layers and operations that a functional model is a graph of."""
    graph = getattr(model, "_functional", model)
    return list(getattr(graph, "operations", ()))


@contextlib.contextmanager
def input_dtypes_replaced(
    models: Sequence[keras.Model], dtypes: dict[str, str]
) -> Iterator[None]:
    """Within it functional models cast their inputs to other dtypes."""
    graphs = [getattr(model, "_functional", None) or model for model in models]
    tensors = [
        tensor
        for graph in graphs
        for tensor in getattr(graph, "_inputs", ())
        if tensor.dtype in dtypes
    ]
    before = [tensor._dtype for tensor in tensors]
    for tensor in tensors:
        tensor._dtype = dtypes[tensor._dtype]
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor._dtype = dtype


@contextlib.contextmanager
def values_replaced(
    variables: Iterable[keras.Variable], dtype: str
) -> Iterator[None]:
    """Within it variables are kept, and read, in another dtype."""
    before = [(variable, variable._value) for variable in variables]
    for variable, value in before:
        variable._value = tf.Variable(
            tf.cast(value, dtype), trainable=False, name=variable.name
        )
    try:
        yield
    finally:
        for variable, value in before:
            variable._value = value


def input_structure(model: keras.Model) -> Any:
    """The symbolic inputs, in the structure of the call; None where unknown."""
    graph = getattr(model, "_functional", None) or model
    structure: Any = getattr(graph, "_inputs_struct", None)
    is_sequence = isinstance(structure, (list, tuple)) and len(structure) == 1
    return structure[0] if is_sequence else structure


def called_shapes(model: keras.Model) -> Any:
    """The shapes of the first argument that a model was built with, or None."""
    shapes = getattr(model, "_build_shapes_dict", None)
    return next(iter(shapes.values())) if shapes else None


def input_name(tensor: Any) -> str | None:
    """The name of the `Input` that a symbolic tensor comes from."""
    history = getattr(tensor, "_keras_history", None)
    return getattr(history and history.operation, "name", None)


_KEYS_OF_A_STRATEGY = 100_000
_collective_key_bases = itertools.count(
    _KEYS_OF_A_STRATEGY, _KEYS_OF_A_STRATEGY
)
_with_own_collectives: weakref.WeakSet[tf.distribute.Strategy] = (
    weakref.WeakSet()
)


def separate_collectives(strategy: tf.distribute.Strategy) -> None:
    """Numbers a MirroredStrategy's collectives apart from all others' here.

    TensorFlow starts each strategy of a process at the same number, and takes
    the sums of a second one, made when a cell of a notebook runs again or for
    another number of devices, for those of the first: it aborts all of them
    where shapes differ.
    """
    if (
        not isinstance(strategy, tf.distribute.MirroredStrategy)
        or strategy in _with_own_collectives
    ):
        return
    _with_own_collectives.add(strategy)
    extended = strategy.extended
    before = extended._collective_ops
    extended._collective_key_base = next(_collective_key_bases)
    extended._collective_ops = extended._make_collective_ops_with_fallbacks()
    if extended._cross_device_ops is before:
        extended._cross_device_ops = extended._collective_ops
