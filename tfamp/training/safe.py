"""What makes one line enough: a model that is built, and safe in 16 bits.

`fit` does what was left out, and says it in one line.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import keras
from absl import logging

from tfamp import keras_internals
from tfamp.errors import InputError
from tfamp.layers.float8 import float8
from tfamp.precision import before
from tfamp.precision import keep_float32 as precision
from tfamp.precision.maps import reach_pathless
from tfamp.precision.policy import FLOAT8, last_precision, precision_of
from tfamp.scaling.optimizer import LossScaleOptimizer, wrap_optimizer
from tfamp.training.data import one_line
from tfamp.training.warning import warn


def build_layers(model: keras.Model, element_spec, is_custom: bool) -> None:
    """Creates the variables of the layers by a batch's specs.

    Before that, layers that a map of precisions does not reach get theirs.
    A step of the model's own may call it on something else, or not at all:
    what then fails here builds itself there.
    """
    reach_pathless(model)
    if type(model).call is keras.Model.call:
        return
    try:
        with _said_in_one_line(model):
            keras_internals.build_layers(model, element_spec)
    except Exception:
        if not is_custom:
            raise


def build_rest(model: keras.Model, element_spec, is_custom: bool) -> None:
    """Creates the variables of loss, metrics and optimizer."""
    if is_custom:
        try:
            keras_internals.build_everything(model, element_spec)
        except Exception:
            # A loss or metrics of other things than model(x) and y.
            keras_internals.build_optimizer(model)
        return
    try:
        with _said_in_one_line(model):
            keras_internals.build_everything(model, element_spec)
    except Exception as error:
        if _lacks_targets(model, element_spec):
            raise InputError(
                f"Model {model.name!r} was compiled with a loss, but the data "
                "have no targets: pass y, or batches of (x, y)."
            ) from error
        raise


def _lacks_targets(model: keras.Model, element_spec) -> bool:
    """Whether a loss of `compile` finds nothing to compare outputs with."""
    _, y, _ = keras.utils.unpack_x_y_sample_weight(element_spec)
    return y is None and keras_internals.compile_arguments(model)["loss"]


@contextlib.contextmanager
def _said_in_one_line(model: keras.Model) -> Iterator[None]:
    """Data that do not fit a model are no error of the library's."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Model {model.name!r} cannot take these data: {one_line(error)}"
        ) from error


def make_safe(
    model: keras.Model,
    keep_float32: bool | str,
    verbose: int | str,
    is_custom: bool = False,
    spec: Any = None,
) -> None:
    """Keeps in float32 what needs it, and wraps the optimizer.

    A step of the model's own may know of no scale: its optimizers stay, but
    for Keras's scalers.

    Args:
        model: a built model.
        keep_float32: "auto", True or False.
        verbose: whether what was done is shown, or logged.
        is_custom: whether the model has a `train_step` of its own.
        spec: what the data's `element_spec` is, if there are data.
    """
    if keep_float32 not in (True, False, "auto"):
        raise InputError(
            f"keep_float32={keep_float32!r}; expected 'auto' or False."
        )
    done = [] if is_custom else _use_float8(model)
    is_float32 = precision_of(model) == "float32"
    if keep_float32 and not is_float32:
        done += _keep(model, keep_float32, spec)
    if is_custom:
        replace_scalers(model)
    wrapped = None if is_custom else _wrap_optimizer(model)
    if wrapped and not is_float32:
        done.append(wrapped)
    if done:
        say(verbose, "; ".join(done))


def say(verbose: int | str, done: str) -> None:
    """Tells what fit did by itself: on the screen, or in the log."""
    line = f"tfamp.fit: {done}."
    if verbose:
        print(line, flush=True)
    else:
        logging.info(line)


def replace_scalers(model: keras.Model) -> None:
    """Puts ours in the place of Keras's scalers in a model with its own step.

    Their `scale_loss` and `apply` are called as before; optimizers without a
    scaler stay, since such a step may know of no scale.
    """
    for holder in [model, *keras_internals.all_layers(model)]:
        for name, value in list(vars(holder).items()):
            if isinstance(
                value, keras.optimizers.LossScaleOptimizer
            ) and not isinstance(value, LossScaleOptimizer):
                safe = _in_place_of(value)
                if value is model.optimizer:
                    keras_internals.replace_optimizer(model, safe)
                else:
                    setattr(holder, name, safe)


def _in_place_of(
    scaler: keras.optimizers.LossScaleOptimizer,
) -> LossScaleOptimizer:
    """Keras's own corrupts weights when a replica but the first overflows."""
    safe = LossScaleOptimizer(
        scaler.inner_optimizer,
        initial_scale=2.0 ** round(math.log2(scaler.initial_scale)),
        dynamic_growth_steps=scaler.dynamic_growth_steps,
    )
    if scaler.built:
        # Where it has moved to; Keras's knows no limits.
        scale = float(scaler.dynamic_scale)
        rule = safe.rule
        if rule.min_scale <= scale <= rule.max_scale:
            safe.dynamic_scale.assign(scale)
            safe.step_counter.assign(scaler.step_counter)
    return safe


def _keep(model: keras.Model, keep_float32: bool | str, spec: Any) -> list[str]:
    if keep_float32 == "auto" and keras_internals.is_marked(
        model, "tfamp_keep_float32"
    ):
        # As the caller did it.
        return []
    try:
        kept = _kept(model, spec)
    except InputError as error:
        return [f"keep_float32 was not possible everywhere ({error})"]
    changed = [each.path for each in kept if each.changed]
    if not changed:
        return []
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return [
        f"kept {', '.join(changed[:3])}{more} in float32 "
        "(keep_float32=False leaves them)"
    ]


def _kept(model: keras.Model, spec: Any) -> list[precision.Float32Layer]:
    former = before.remember([model, *keras_internals.all_layers(model)])
    try:
        return precision.keep_float32(model)
    except InputError:
        if spec is None:
            raise
    before.put_back(former)
    # With the sizes of its data; what it says then is the better reason.
    return precision.keep_float32(model, batch=spec)


def _use_float8(model: keras.Model) -> list[str]:
    """What `set_precision("float8")` asked of models built under it."""
    is_wanted = last_precision() == FLOAT8 == keras_internals.session_mark()
    if not is_wanted or precision_of(model) != "mixed_bfloat16":
        return []
    try:
        layers = float8(model)
    except InputError as error:
        return [f"no 8-bit products ({error})"]
    return [f"8-bit products in {len(layers)} layers"]


def _wrap_optimizer(model: keras.Model) -> str | None:
    """Puts the optimizer into a `LossScaleOptimizer`, unless it is in one."""
    optimizer = model.optimizer
    if optimizer is None or isinstance(optimizer, LossScaleOptimizer):
        return None
    computes_in = precision_of(model)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        safe = _in_place_of(optimizer)
    elif computes_in == model.dtype_policy.name == "mixed_float16":
        # Keras would have wrapped it, had it not been told otherwise.
        safe = wrap_optimizer(optimizer, "float32")
        safe.wrapped_for = None
        warn(
            f"Model {model.name!r} trains in float16 without loss scaling, as "
            "compile(auto_scale_loss=False) says: gradients below 2^-24 become "
            "0. Leave that out, or compile with "
            "tfamp.wrap_optimizer(optimizer)."
        )
    else:
        safe = wrap_optimizer(optimizer, computes_in)
    # A fixed scale of 1 is nothing to keep: files need no tfamp for it. What
    # several optimizers hold is in them each, and not in one place.
    safe.is_in_files = safe.dynamic or hasattr(optimizer, "optimizers")
    keras_internals.replace_optimizer(
        model, safe, saved=safe if safe.is_in_files else optimizer
    )
    if not safe.dynamic:
        return "wrapped the optimizer, to skip steps that are not finite"
    return f"wrapped the optimizer, loss scale {safe.initial_scale:g}"
