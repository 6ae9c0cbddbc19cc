"""The learning rate of the recipes: up to its highest, and down again."""

import keras


def warm_cosine(
    highest: float, steps: int, warmup_steps: int, end: float = 0.0
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Rises in a line from zero, then falls along half a cosine.

    Args:
        highest: the rate after the warm-up.
        steps: of the whole training.
        warmup_steps: those in which it rises.
        end: what it falls to, as a share of the highest.
    """
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=max(steps - warmup_steps, 1),
        alpha=end,
        warmup_target=highest,
        warmup_steps=warmup_steps,
    )
