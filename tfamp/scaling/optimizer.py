"""Loss scaling that takes one decision for all replicas.

float16 gradients below 2^-24 are zero. Multiplying the loss by a scale lifts
them; the optimizer divides it out again in float32. A scale that is too high
makes a gradient inf: that step is skipped and the scale halved. (Micikevicius
et al. 2018, "Mixed Precision Training", section 3.2.)
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tfamp import keras_internals, tensorflow_internals
from tfamp.distribute.strategy import computes_on_gpus
from tfamp.errors import InputError
from tfamp.files.saved_models import say_how_to_load
from tfamp.scaling import gradients as gradients_lib
from tfamp.scaling import moved_state
from tfamp.scaling.backward import gradients_scaled_by
from tfamp.scaling.fused_updates import fused_updates
from tfamp.scaling.own_loss import (
    LOSS_NAMES,
    Part,
    Reduction,
    divided_in_own_step,
    takes_its_part,
)
from tfamp.scaling.rule import (
    ScaleRule,
    ScaleState,
    check_rule,
    count_step,
    move_scale,
)
from tfamp.scaling.shards import Shards, check_can_shard

# A true gradient of 2^39 still fits into float16 at the lowest of them.
_INITIAL_WIRE_SCALE = 2.0**16
_MIN_WIRE_SCALE = 2.0**-24

_INSTEAD = (
    "{name} is gone from Keras 3; write loss, gradients = "
    "tfamp.value_and_gradients(loss_fn, model.trainable_variables, optimizer) "
    "and then optimizer.apply(gradients, model.trainable_variables), which "
    "unscales, and clips as the inner optimizer says."
)

# Optimizers that overwrite weights with their averages, and how often.
_EmaFrequencies = list[tuple[keras.optimizers.Optimizer, int]]


@keras.saving.register_keras_serializable(package="tfamp")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Scales the loss, and applies or skips each step on all replicas alike.

    One step: sum the gradients over replicas; look once whether the sums are
    finite; unscale them in float32; apply them with the inner optimizer, or
    skip. The inner optimizer clips, decays and averages the true global
    gradient. A skipped step leaves weights, moments, averages and `iterations`
    as they were, bit for bit.

    Works in `tfamp.fit`, in `keras.Model.fit`, and in hand-written loops, in
    the replica context of any strategy. There it must be built in the
    strategy's scope before the first traced step; `tfamp.fit` and
    `keras.Model.fit` see to that.

    What the step moved before it was skipped, batch statistics and the loss
    that was counted, is put back too: in `tfamp.fit` all of it, also metrics;
    elsewhere what the same graph assigned before `apply`, and in eager code
    what the loss function of `value_and_gradients` assigned. Seeds go on.
    `keras.Model.fit` updates its other metrics after `apply`, out of reach;
    and in eager code without `value_and_gradients` batch statistics stay moved.

    Args:
        inner_optimizer: the `keras.optimizers.Optimizer` to wrap.
        initial_scale: the first loss scale.
        growth_factor: multiplies the scale after clean steps.
        backoff_factor: multiplies the scale at an overflow.
        dynamic_growth_steps: clean steps in a row until the scale grows.
        min_scale: the floor.
        max_scale: the ceiling.
        hysteresis: overflows that it takes to back off; the count starts
            again when the scale grows.
        dynamic: False keeps the scale at `initial_scale`; non-finite steps
            are skipped and counted all the same.
        shard: each replica keeps and updates its part of the moments and of
            the float32 weights only. For inner optimizers that act element by
            element: Adam, AdamW, SGD, Lion and the like. The numbers stay the
            same, to the bit; `tfamp.fit` then also keeps in 16 bits what the
            model reads in 16 bits.
        name: name of the optimizer.
        **base_arguments: refused, as by Keras, with the advice to set them on
            `inner_optimizer`; their defaults occur in old saved configs.

    Attributes:
        dynamic_scale: float32 variable, the current loss scale.
        skipped_steps: integer variable, steps skipped so far.
        consecutive_skips: integer variable, steps skipped since the last
            applied one.
        iterations: integer variable, steps applied so far.
        all_reduce_dtype: None, "float16" or "bfloat16": the dtype in which
            gradients cross between replicas.
        wrapped_for: the compute dtype that `wrap_optimizer` chose the scale
            for; None where the scale was chosen by hand.
        is_in_files: False where files hold the inner optimizer alone, as
            the model was compiled with it, and `fit` wrapped it by itself.
        shards: where the masters and moments are; None without `shard`, and
            before the optimizer is built.

    Raises:
        InputError: for a scale or factor that is no power of two (only those
            scale exactly), bounds that contradict each other, or an optimizer
            that cannot work on a part of a weight.
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        initial_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        dynamic_growth_steps: int = 2000,
        min_scale: float = 1.0,
        max_scale: float = 2.0**24,
        hysteresis: int = 1,
        dynamic: bool = True,
        shard: bool = False,
        name: str | None = None,
        **base_arguments: Any,
    ):
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise InputError(
                f"{type(inner_optimizer).__name__} scales the loss already; "
                "wrap its inner_optimizer instead."
            )
        super().__init__(
            inner_optimizer,
            initial_scale=float(initial_scale),
            dynamic_growth_steps=dynamic_growth_steps,
            name=name,
            **base_arguments,
        )
        self.rule = ScaleRule(
            float(growth_factor),
            float(backoff_factor),
            dynamic_growth_steps,
            float(min_scale),
            float(max_scale),
            hysteresis,
        )
        self.dynamic = dynamic
        check_rule(self.initial_scale, self.rule, dynamic)
        if shard:
            check_can_shard(inner_optimizer)
        self.shard = shard
        self.shards: Shards | None = None
        self._all_reduce_dtype: str | None = None
        self.wrapped_for: str | None = None
        self.is_in_files = True
        # Replicas compute these alike, each for itself: aggregation "none".
        self.dynamic_scale = self.add_variable(
            (),
            keras.initializers.Constant(self.initial_scale),
            dtype="float32",
            name="dynamic_scale",
        )
        self.step_counter = self._add_counter("step_counter", 0)
        self.tolerance = self._add_counter("tolerance", hysteresis)
        self.skipped_steps = self._add_counter("skipped_steps", 0)
        self.consecutive_skips = self._add_counter("consecutive_skips", 0)
        self._count_unbuilt = len(self.variables)

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        """Those of an inner `MultiOptimizer`; callbacks set their rates."""
        # Any other has no such attribute, and neither has this one then.
        return self.inner_optimizer.optimizers

    @property
    def all_reduce_dtype(self) -> str | None:
        return self._all_reduce_dtype

    @all_reduce_dtype.setter
    def all_reduce_dtype(self, dtype: str | None):
        if dtype not in (None, "float32", "float16", "bfloat16"):
            raise InputError(
                f"Unknown all_reduce_dtype {dtype!r}; expected None, "
                "'float32', 'float16' or 'bfloat16'."
            )
        self._all_reduce_dtype = dtype

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        """Creates the inner optimizer's variables, in the current scope."""
        if self.inner_optimizer.gradient_accumulation_steps and _replicas() > 1:
            raise InputError(
                "gradient_accumulation_steps works on one replica only, and "
                f"the strategy has {_replicas()}; use "
                "tfamp.fit(microbatches=...) instead."
            )
        strategy = tf.distribute.get_strategy()
        tensorflow_internals.separate_collectives(strategy)
        if not all(
            strategy.extended.variable_created_in_scope(variable.value)
            for variable in self.variables
        ):
            raise InputError(
                f"Optimizer {self.inner_optimizer.name!r} was not created "
                "under the strategy that it runs under; create it within "
                "strategy.scope(), where the model is."
            )
        if not self.inner_optimizer.built:
            self._build_inner(var_list)
        elif self.shard and self.shards is None:
            raise InputError(
                f"Optimizer {self.inner_optimizer.name!r} is built already, on "
                "whole weights; give shard=True one that is not."
            )
        # Keras's own LossScaleOptimizer.build would add its two variables
        # again; the base class only records the variables.
        super(keras.optimizers.LossScaleOptimizer, self).build(var_list)

    def _build_inner(self, var_list: Sequence[keras.Variable]) -> None:
        # Built in a step that is traced, as by Model.fit, it would set its
        # variables in that step: those of ScheduleFreeAdamW too late.
        with (
            contextlib.nullcontext()
            if tf.distribute.has_strategy()
            else tf.init_scope()
        ):
            if self.shard:
                self.shards = Shards(self.inner_optimizer, var_list)
            else:
                self.inner_optimizer.build(var_list)

    def get_scaled_loss(self, loss):
        """Of TensorFlow 2's guides; says what to write in its place."""
        raise InputError(_INSTEAD.format(name="get_scaled_loss"))

    def get_unscaled_gradients(self, grads):
        """Of TensorFlow 2's guides; says what to write in its place."""
        raise InputError(_INSTEAD.format(name="get_unscaled_gradients"))

    def scale_loss(self, loss):
        """`loss` times the scale, in float32: 16 bits cannot hold 65536."""
        if self.scale_is_one:
            return loss
        return ops.cast(loss, "float32") * self._scale()

    def apply(
        self,
        grads: Sequence[Any],
        trainable_variables: Sequence[Any] | None = None,
    ) -> None:
        """Applies scaled gradients, or skips the step, on all replicas.

        Args:
            grads: one scaled gradient per variable, dense or
                `tf.IndexedSlices` or None, of this replica alone.
            trainable_variables: the variables, in the same order; None for
                those that the optimizer was built with.

        Raises:
            ValueError: outside of a replica context, or for variables that
                the optimizer was not built with.
        """
        if len(grads) == 0:
            return
        if tf.distribute.in_cross_replica_context():
            raise ValueError(
                "apply() was called outside of the replica context; call it "
                "in the function that you pass to strategy.run()."
            )
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                self.build(trainable_variables)
        variables = trainable_variables or self._trainable_variables
        grads = gradients_lib.to_tensors(grads)
        overwrites = [
            keras_internals.overwrites_with_gradient(v) for v in variables
        ]
        divided = divided_in_own_step(self, grads)
        grads = [
            before if overwrites[i] else divided[i]
            for i, before in enumerate(grads)
        ]
        shards = self.shards
        if shards is not None:
            grads = shards.wide(grads, variables)
        reduced = gradients_lib.all_reduce(
            grads, overwrites, self.all_reduce_dtype
        )
        weights = variables
        # A gradient that is clipped by its own norm is needed whole.
        clips_each = shards is not None and self.inner_optimizer.clipnorm
        finite, unscaled = gradients_lib.unscale(
            reduced,
            overwrites,
            self.applied_scale,
            self._clip_norm,
            take=None
            if shards is None or clips_each
            else functools.partial(shards.parts, weights=weights),
        )
        if shards is not None:
            if clips_each:
                clipped = keras_internals.clipped(
                    self.inner_optimizer, unscaled
                )
                unscaled = shards.parts(clipped, weights=weights)
            with tf.name_scope(moved_state.SCOPE_OF_OPTIMIZER):
                shards.follow(weights)
            variables = shards.masters_of(weights)
        keeps_state = not moved_state.is_kept_by_caller()
        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            # XLA on GPUs, TPU: replicas run on their own; the flag is the
            # same on each, and no branch holds a collective.
            self._apply_if(keeps_state, finite, unscaled, variables)
        else:
            # The inner optimizer updates in cross-replica context, which a
            # tf.cond in replica context cannot enter: branch around it.
            tf.distribute.get_replica_context().merge_call(
                functools.partial(self._apply_if_everywhere, keeps_state),
                args=(finite, unscaled, variables),
            )
        if shards is not None:
            # Always, since no branch may hold a collective: after a skipped
            # step they are what they were.
            shards.publish(weights)
        if tf.executing_eagerly():
            put_back = moved_state.forget_noted(self)
            if not finite:
                put_back()
        with tf.name_scope(moved_state.SCOPE_OF_OPTIMIZER):
            self._record(finite)

    def finalize_variable_values(self, var_list) -> None:
        """Writes the moving averages (`use_ema`) into the model's weights."""
        if self.shards is not None:
            if self.inner_optimizer.use_ema:
                self.shards.finalize()
            return
        for optimizer in keras_internals.averaging_optimizers(
            self.inner_optimizer
        ):
            _overwrite_with_averages(optimizer)

    def save_own_variables(self, store) -> None:
        """Writes whole variables, also of an optimizer in shards."""
        if not self.is_in_files:
            self.inner_optimizer.save_own_variables(store)
        elif self.shards is None:
            super().save_own_variables(store)
        else:
            self.shards.save(self.variables, store)

    def load_own_variables(self, store) -> None:
        """Takes what an optimizer with or without shards has saved.

        And what one has that is not wrapped, or in Keras's own scaler.
        """
        count, inner = len(store.keys()), self.inner_optimizer
        of_keras = keras_internals.state_of_scaler(store, inner)
        if self.built and _is_of_unbuilt(store, self._count_unbuilt):
            # Of one that never stepped, which had no moments yet.
            for i, variable in enumerate(self.variables[:count]):
                variable.assign(store[str(i)])
        elif self.shards is None and count == len(inner.variables):
            inner.load_own_variables(store)
        elif self.shards is None and of_keras is not None:
            scale, step_counter, state = of_keras
            inner.load_own_variables(state)
            if self.dynamic:
                self.dynamic_scale.assign(scale)
                self.step_counter.assign(step_counter)
        elif self.shards is None or count != len(self.variables):
            super().load_own_variables(store)
        else:
            self.shards.load(self.variables, store)

    def __dir__(self):
        # Keras saves what it finds here once more, and misses it in the files
        # of optimizers without a wrapper. All variables are in ours.
        inner = {"inner_optimizer", "optimizers"}
        return [name for name in super().__dir__() if name not in inner]

    def scale_for_float16_wire(self) -> None:
        """Turns dynamic scaling on, for gradients that cross in float16.

        They may be of any size that float32 holds, so that the scale may go
        below 1. The variables are those that a fixed scale has as well: also
        an optimizer that is built can change. To be called before a step is
        traced.
        """
        self.rule = self.rule._replace(min_scale=_MIN_WIRE_SCALE)
        self.dynamic, self.initial_scale = True, _INITIAL_WIRE_SCALE
        self.wrapped_for = "float16"
        check_rule(self.initial_scale, self.rule, self.dynamic)
        self.dynamic_scale.assign(self.initial_scale)

    def get_config(self) -> dict:
        say_how_to_load()
        config = super().get_config()
        rule = self.rule
        return config | {
            "growth_factor": rule.growth_factor,
            "backoff_factor": rule.backoff_factor,
            "min_scale": rule.min_scale,
            "max_scale": rule.max_scale,
            "hysteresis": rule.hysteresis,
            "dynamic": self.dynamic,
            "shard": self.shard,
        }

    def _add_counter(self, name: str, value: int) -> keras.Variable:
        return self.add_variable(
            (), keras.initializers.Constant(value), dtype="int", name=name
        )

    @property
    def scale_is_one(self) -> bool:
        """Whether it is fixed at 1: then nothing is multiplied at all."""
        return not self.dynamic and self.initial_scale == 1.0

    @property
    def applied_scale(self) -> tf.Tensor | None:
        """What `scale_loss` multiplies by now; None for 1."""
        return None if self.scale_is_one else self._scale()

    def _scale(self):
        # A fixed scale is the one it was made with, also after a checkpoint
        # of a dynamic one was loaded into the variable.
        if self.dynamic:
            return ops.convert_to_tensor(self.dynamic_scale)
        return ops.convert_to_tensor(self.initial_scale, dtype="float32")

    @property
    def _clip_norm(self) -> float | None:
        """The global norm that is clipped to here, in the inner one's place."""
        return keras_internals.global_clip_norm(self.inner_optimizer)

    def _apply_if(self, keeps_state, finite, gradients, variables) -> None:
        """Applies or skips, in replica context."""
        moved = moved_state.moved_so_far() if keeps_state else []

        def apply():
            with self._inner_prepared() as frequencies:
                self.inner_optimizer.apply(gradients, variables)
            self._overwrite_with_averages_every(frequencies)

        tf.cond(finite, apply, lambda: moved_state.put_back(moved))

    def _apply_if_everywhere(
        self, keeps_state, strategy, finite, gradients, variables
    ) -> None:
        """Applies or skips, in cross-replica context."""
        moved = moved_state.moved_so_far() if keeps_state else []

        def apply():
            with self._inner_prepared() as frequencies:
                strategy.extended.call_for_each_replica(
                    self.inner_optimizer.apply, args=(gradients, variables)
                )
            self._overwrite_with_averages_every(frequencies)

        # The gradients were reduced, so that every replica's flag is this one.
        one_finite = strategy.experimental_local_results(finite)[0]
        tf.cond(one_finite, apply, lambda: moved_state.put_back(moved))

    @contextlib.contextmanager
    def _inner_prepared(self) -> Iterator[_EmaFrequencies]:
        """The inner optimizer as `apply` needs it; yields EMA frequencies."""
        inner = self.inner_optimizer
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            enter(keras_internals.gradients_already_reduced(inner))
            clips_each = self.shards is not None and inner.clipnorm
            if self._clip_norm or clips_each:
                enter(keras_internals.gradients_already_clipped(inner))
            enter(fused_updates(inner, self.shards))
            if computes_on_gpus(tf.distribute.get_strategy()):
                enter(keras_internals.schedules_on_host(inner))
            yield enter(keras_internals.average_overwrite_deferred(inner))

    def _overwrite_with_averages_every(
        self, frequencies: _EmaFrequencies
    ) -> None:
        for optimizer, frequency in frequencies:
            tf.cond(
                ops.equal(optimizer.iterations % frequency, 0),
                functools.partial(_overwrite_and_constrain, optimizer)
                if self.shards is None
                else self.shards.overwrite_with_averages,
                lambda: None,
            )

    def _record(self, finite) -> None:
        """Moves the scale and the counters, in replica context."""
        variables = ScaleState(
            scale=self.dynamic_scale,
            clean_steps=self.step_counter,
            tolerance=self.tolerance,
            skipped_steps=self.skipped_steps,
            consecutive_skips=self.consecutive_skips,
        )
        before = ScaleState(*map(ops.convert_to_tensor, variables))
        if self.dynamic:
            after = move_scale(before, finite, self.rule)
        else:
            after = count_step(before, finite)._replace(scale=self._scale())
        for variable, value in zip(variables, after, strict=True):
            variable.assign(value)


def wrap_optimizer(
    optimizer: keras.optimizers.Optimizer | str,
    precision: str | None = None,
    **options: Any,
) -> LossScaleOptimizer:
    """Wraps an optimizer as the precision needs it.

    The wrapper is there in every precision: a checkpoint has one layout, and
    a step that is not finite is skipped, also in float32.

    Args:
        optimizer: a Keras optimizer, or its name.
        precision: "float32", "mixed_bfloat16", "mixed_float16" or "float8";
            None asks the global dtype policy.
        **options: arguments of `LossScaleOptimizer`, as `shard=True`. They
            win over what the precision suggests: dynamic scaling for
            mixed_float16, a fixed scale of 1 otherwise.

    Returns:
        A `LossScaleOptimizer`.

    Raises:
        InputError: for what is no optimizer, or scales the loss already.
    """
    if isinstance(optimizer, type):
        raise InputError(
            f"{optimizer.__name__} is a class; pass an optimizer: "
            f"wrap_optimizer({optimizer.__name__}(...))."
        )
    # Numbers of 8 bits have scales of their own, on bfloat16.
    precision = "mixed_bfloat16" if precision == "float8" else precision
    policy = keras.dtype_policies.get(precision or keras.config.dtype_policy())
    is_chosen = bool({"dynamic", "initial_scale"} & options.keys())
    if policy.compute_dtype != "float16" and not options.get("dynamic"):
        options = {"dynamic": False, "initial_scale": 1.0} | options
    try:
        optimizer = keras.optimizers.get(optimizer)
    except ValueError as error:
        raise InputError(str(error).splitlines()[0]) from None
    wrapped = LossScaleOptimizer(optimizer, **options)
    if not is_chosen:
        wrapped.wrapped_for = policy.compute_dtype
    return wrapped


def value_and_gradients(
    loss_fn: Callable[[], tf.Tensor],
    variables: Sequence[keras.Variable],
    optimizer: keras.optimizers.Optimizer,
    reduction: Reduction | None = None,
) -> tuple[tf.Tensor, list[gradients_lib.Gradient]]:
    """The loss, and the scaled gradients that `optimizer.apply` expects.

    For a `train_step` of your own; several optimizers with a scale each work
    side by side:

        loss, gradients = tfamp.value_and_gradients(loss_fn, weights, optimizer)
        optimizer.apply(gradients, weights)

    `loss_fn` is written as for one device: a mean over the rows that it sees,
    never divided by a number of replicas. On any number of replicas the update
    is that of the global batch, whether the mean is taken by `keras.ops.mean`,
    a Keras loss object or `compute_loss`, which are not divided by the number
    of replicas in there. Keras's masked and weighted means, and its sums, are
    those of the global batch too. `fit` knows how many rows each replica has;
    elsewhere, and in a `tf.function` of the step's own, all count alike.

    Args:
        loss_fn: computes the loss, a scalar, from nothing.
        variables: what to differentiate by.
        optimizer: the optimizer whose scale applies.
        reduction: what `loss_fn` takes of the rows: "mean", or "sum" where
            losses add up over replicas, as a sum over rows does and
            `tf.nn.compute_average_loss` with the global batch size. None is
            "mean"; lint then says where it looks like a sum.

    Returns:
        The loss in float32, not scaled, whose mean over replicas is the loss
        of the global batch; and one gradient per variable, scaled; None where
        the loss does not depend on the variable.

    Raises:
        InputError: for a loss that is no scalar, or an unknown reduction.
    """
    if reduction not in (None, "mean", "sum"):
        raise InputError(
            f"reduction={reduction!r}; expected 'mean' or 'sum': what loss_fn "
            "takes of its rows."
        )
    part = Part(reduction or "mean")
    takes_its_part(optimizer)
    with tf.GradientTape() as tape:
        with part.of_keras(), moved_state.noted_for(optimizer):
            loss = tf.convert_to_tensor(loss_fn())
        if loss.shape.rank:
            raise InputError(
                f"loss_fn returned the shape {loss.shape}; return one number: "
                "keras.ops.mean(loss), or keras.ops.sum(loss) with "
                "reduction='sum'."
            )
        # 16 bits cannot hold a loss times 65536.
        loss = tf.identity(tf.cast(loss, tf.float32), LOSS_NAMES[reduction])
        scaled_loss = optimizer.scale_loss(part.trained(loss))
    sources = [
        variable.value if isinstance(variable, keras.Variable) else variable
        for variable in variables
    ]
    with gradients_scaled_by(optimizer):
        gradients = tape.gradient(scaled_loss, sources)
    return part.logged(loss), gradients


def _is_of_unbuilt(store, count: int) -> bool:
    """Whether numbers alone were saved, as many as before there are moments."""
    return len(store.keys()) == count and all(
        not store[str(i)].shape for i in range(count)
    )


def _overwrite_and_constrain(optimizer: keras.optimizers.Optimizer) -> None:
    """As Keras does in training: an average may leave a constraint's bounds."""
    _overwrite_with_averages(optimizer)
    for variable, _ in keras_internals.moving_averages(optimizer):
        if variable.constraint is not None:
            value = tf.convert_to_tensor(variable.value)
            variable.value.assign(variable.constraint(value))


def _overwrite_with_averages(optimizer: keras.optimizers.Optimizer) -> None:
    for variable, average in keras_internals.moving_averages(optimizer):
        variable.value.assign(average.value)


def _replicas() -> int:
    return tf.distribute.get_strategy().num_replicas_in_sync
