"""Gradients that cross between replicas in float16 need a loss scale.

float32 forward, float16 on the wire, float32 update: half the bytes, and each
number right as long as a scale keeps the gradients within float16. A fixed
scale of 1 would turn those below 2^-24 into zeros, without a word.
"""

from collections.abc import Iterable

import tensorflow as tf

from tfamp.errors import InputError
from tfamp.scaling.optimizer import LossScaleOptimizer


def prepare(
    optimizers: Iterable[LossScaleOptimizer],
    all_reduce_dtype: str | None,
    strategy: tf.distribute.Strategy,
    is_custom: bool,
) -> str | None:
    """Tells optimizers how gradients cross, and scales them where they must be.

    Where nobody chose a scale it becomes dynamic, also on one replica, so
    that a run goes on over any number of them.

    Args:
        optimizers: of the model.
        all_reduce_dtype: what gradients cross in; None for their own.
        strategy: what the model trains under.
        is_custom: whether the model's own step scales the loss, or not.

    Returns:
        What was changed, in one line; None where nothing was.

    Raises:
        InputError: for float16 and a scale that was fixed at 1.
    """
    changed = False
    for optimizer in optimizers:
        optimizer.all_reduce_dtype = all_reduce_dtype
        if all_reduce_dtype != "float16" or not optimizer.scale_is_one:
            continue
        if optimizer.wrapped_for is not None and not is_custom:
            optimizer.scale_for_float16_wire()
            changed = True
        elif strategy.num_replicas_in_sync > 1:
            raise InputError(
                "all_reduce_dtype='float16' with a loss scale fixed at 1: "
                "gradients below 2^-24 would be lost between replicas; use "
                "tfamp.LossScaleOptimizer(optimizer, min_scale=2.0**-24), or "
                "all_reduce_dtype='bfloat16'."
            )
    if not changed:
        return None
    return "scales the loss, since gradients cross between replicas in float16"
