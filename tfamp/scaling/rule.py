"""How a loss scale moves: pure arithmetic on scalars, in one place."""

import math
from typing import NamedTuple

import keras
from keras import ops

from tfamp.errors import InputError

# From 2**127 on its reciprocal is subnormal in float32, and flushed to zero.
LARGEST_SCALE = 2.0**126


class ScaleRule(NamedTuple):
    """How a dynamic scale moves; all factors and bounds are powers of two."""

    growth_factor: float
    backoff_factor: float
    growth_steps: int
    min_scale: float
    max_scale: float
    hysteresis: int


class ScaleState(NamedTuple):
    """What loss scaling remembers from one step to the next; all scalars.

    scale: float32, what the loss is multiplied by.
    clean_steps: finite steps since the scale last moved or a step overflowed.
    tolerance: overflows that remain until the scale backs off.
    skipped_steps: non-finite steps so far.
    consecutive_skips: non-finite steps since the last finite one.
    """

    scale: keras.KerasTensor
    clean_steps: keras.KerasTensor
    tolerance: keras.KerasTensor
    skipped_steps: keras.KerasTensor
    consecutive_skips: keras.KerasTensor


def count_step(state: ScaleState, finite) -> ScaleState:
    """The state after a step, of a scale that stays where it is."""
    skipped = ops.cast(ops.logical_not(finite), state.skipped_steps.dtype)
    return state._replace(
        skipped_steps=state.skipped_steps + skipped,
        consecutive_skips=(state.consecutive_skips + skipped) * skipped,
    )


def move_scale(state: ScaleState, finite, rule: ScaleRule) -> ScaleState:
    """The state after a step, of a dynamic scale.

    Args:
        state: before the step.
        finite: boolean scalar, whether all gradients were finite.
        rule: how the scale moves.

    Returns:
        The state after the step. The scale stays within
        `[min_scale, max_scale]`, whatever the sequence of steps.
    """
    overflow = ops.logical_not(finite)
    clean_steps = ops.where(finite, state.clean_steps + 1, 0)
    tolerance = ops.where(finite, state.tolerance, state.tolerance - 1)
    grows = clean_steps >= rule.growth_steps
    backs_off = ops.logical_and(overflow, tolerance <= 0)
    factor = ops.where(
        grows,
        rule.growth_factor,
        ops.where(backs_off, rule.backoff_factor, 1.0),
    )
    scale = ops.clip(
        state.scale * ops.cast(factor, state.scale.dtype),
        rule.min_scale,
        rule.max_scale,
    )
    return count_step(state, finite)._replace(
        scale=scale,
        clean_steps=ops.where(grows, 0, clean_steps),
        # Overflows in a row at a scale far too high must not each be borne
        # again: the tolerance comes back with growth only.
        tolerance=ops.where(grows, rule.hysteresis, ops.maximum(tolerance, 0)),
    )


def check_rule(initial_scale: float, rule: ScaleRule, dynamic: bool) -> None:
    """Raises `InputError` for a rule that cannot work or is not exact."""
    largest = max(initial_scale, rule.max_scale if dynamic else 0.0)
    if LARGEST_SCALE < largest < math.inf:
        raise InputError(
            f"A loss scale of {largest:g} has no normal reciprocal in float32, "
            "which gradients are multiplied by; use at most 2.0**126."
        )
    for name, value in {
        "initial_scale": initial_scale,
        "growth_factor": rule.growth_factor,
        "backoff_factor": rule.backoff_factor,
        "min_scale": rule.min_scale,
        "max_scale": rule.max_scale,
    }.items():
        if not (
            value > 0 and math.isfinite(value) and math.frexp(value)[0] == 0.5
        ):
            raise InputError(
                f"{name}={value} is no power of two, and only powers of two "
                "scale exactly; use 1024.0, say, or 2.0**-3."
            )
    if rule.growth_factor <= 1:
        raise InputError(f"growth_factor={rule.growth_factor} must be above 1.")
    if rule.backoff_factor >= 1:
        raise InputError(
            f"backoff_factor={rule.backoff_factor} must be below 1."
        )
    if dynamic and not rule.min_scale <= initial_scale <= rule.max_scale:
        raise InputError(
            f"initial_scale={initial_scale} must lie between "
            f"min_scale={rule.min_scale} and max_scale={rule.max_scale}."
        )
    for name, value in {
        "dynamic_growth_steps": rule.growth_steps,
        "hysteresis": rule.hysteresis,
    }.items():
        if value < 1 or not float(value).is_integer():
            raise InputError(
                f"{name}={value} must be a whole number of at least 1."
            )
