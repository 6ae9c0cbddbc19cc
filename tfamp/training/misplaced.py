"""What was called in the wrong place, said in one line by `fit`."""

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.distribute.strategy import last_strategy, note_use
from tfamp.errors import InputError
from tfamp.precision.policy import (
    forget_precision,
    last_precision,
    precision_of,
)
from tfamp.scaling.optimizer import LossScaleOptimizer
from tfamp.training.warning import warn


def check_scope(model: keras.Model) -> None:
    """Refuses variables of no strategy under one.

    A model made outside of a scope takes the strategy that is there when it is
    asked; its variables stay on one device, and replicas would each have
    their own idea of them.
    """
    if keras_internals.is_made_in_scope(model):
        note_use(model.distribute_strategy)
        return
    if not tf.distribute.has_strategy():
        return
    extended = tf.distribute.get_strategy().extended
    if not all(
        extended.variable_created_in_scope(variable.value)
        for variable in model.variables
    ):
        raise InputError(
            f"Model {model.name!r} was built outside of this strategy's scope; "
            "move the lines that build and compile it into "
            "`with strategy.scope():`."
        )


def warn_of(model: keras.Model) -> None:
    """One warning, of the first thing that is not where it should be."""
    message = (
        _strategy_unused(model)
        or _policy_came_late(model)
        or _optimizer_of_another_precision(model)
        or _overrides(model)
    )
    if message:
        warn(f"Model {model.name!r} {message}")


def _strategy_unused(model: keras.Model) -> str | None:
    if keras_internals.is_made_in_scope(model):
        return None
    strategy = last_strategy()
    if strategy is None:
        return None
    return (
        "was built outside of strategy.scope() and trains on one device, not "
        f"on {strategy.num_replicas_in_sync} replicas; move the lines that "
        "build and compile it into `with strategy.scope():`."
    )


def _policy_came_late(model: keras.Model) -> str | None:
    # All that a small model computes may be its head, which was kept.
    had_16_bits = keras_internals.is_marked(model, "tfamp_had_16_bits")
    if had_16_bits or precision_of(model) != "float32":
        return None
    wanted = last_precision()
    now = keras.config.dtype_policy().name
    if wanted not in (None, "float32") and now == "float32":
        if keras_internals.session_mark() is None:
            # Said once: whoever reads it may want float32 from here on.
            forget_precision()
            return (
                "computes in float32: keras.backend.clear_session() undid "
                f"tfamp.set_precision({wanted!r}); move set_precision below "
                "it, before the line that builds the model."
            )
        return None
    if now.startswith("mixed_") and not _has_float32_policies(model):
        return (
            f"computes in float32, but the precision is {now!r}: move "
            f"tfamp.set_precision({now!r}) above the line that builds the "
            "model."
        )
    return None


def _has_float32_policies(model: keras.Model) -> bool:
    """Whether float32 was chosen for layers one by one, as in a map."""
    return isinstance(model.dtype_policy, keras.dtype_policies.DTypePolicyMap)


def _optimizer_of_another_precision(model: keras.Model) -> str | None:
    optimizer = model.optimizer
    if (
        not isinstance(optimizer, LossScaleOptimizer)
        or precision_of(model) != "mixed_float16"
        or optimizer.wrapped_for in (None, "float16")
    ):
        return None
    return (
        "computes in float16, but its optimizer was wrapped for a precision "
        "without loss scaling; move tfamp.wrap_optimizer(...) below "
        "tfamp.set_precision('mixed_float16')."
    )


def _overrides(model: keras.Model) -> str | None:
    for name in ("fit", "make_train_function"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            return (
                f"overrides {name}, which tfamp.fit does not call; override "
                "train_step instead."
            )
    return None
