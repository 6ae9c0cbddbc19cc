"""What tfamp wants to reach, as ratios in one run."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Goal:
    """A ratio of tfamp's and how large it may be.

    Attributes:
        what: in words.
        models: that it is set for.
        ratio: its name in `figures.summarize`.
        limit: that the median over the rounds may reach.
        precision: of tfamp.
        figure: "time" or "memory".
    """

    what: str
    models: tuple[str, ...]
    ratio: str
    limit: float
    precision: str = "mixed_bfloat16"
    figure: str = "time"


_JUDGED = ("tfamp", "tfamp_optimized")
_LARGE = ("resnet50", "gpt4", "gpt12")

GOALS = (
    Goal("tfamp / stock Keras, time", _LARGE, "keras", 0.75),
    Goal("tfamp / best stock Keras, time", ("mlp",), "best_keras", 0.9),
    Goal(
        "tfamp / best stock Keras, time",
        ("mlp",),
        "best_keras",
        0.9,
        precision="float32",
    ),
    Goal("tfamp / its own float32, time", _LARGE, "float32", 0.6),
    Goal("tfamp / PyTorch eager, time", _LARGE, "torch", 1.0),
    Goal("tfamp / best PyTorch, time", _LARGE, "best_torch", 1.0),
    Goal(
        "tfamp / PyTorch eager, memory", _LARGE, "torch", 1.0, figure="memory"
    ),
    Goal(
        "tfamp / best PyTorch, memory",
        _LARGE,
        "best_torch",
        1.0,
        figure="memory",
    ),
    Goal("LossScaleOptimizer / none, time", ("resnet50",), "bare", 1.02),
)


def judge(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The goals that the measured models and contestants say something of.

    Args:
        summary: as `figures.summarize` makes it.

    Returns:
        `what`, `contestant`, `model`, `precision`, `limit`, `measured` (the
        median), `lowest` and `highest` of a round, `against` and `reached`.
    """
    rows = {
        (row["contestant"], row["model"], row["precision"]): row
        for row in summary
    }
    found = []
    for goal in GOALS:
        # What has no LossScaleOptimizer is not optimized either.
        whose = _JUDGED[:1] if goal.ratio == "bare" else _JUDGED
        for model, contestant in itertools.product(goal.models, whose):
            row = rows.get((contestant, model, goal.precision))
            ratio = row and row["ratios"].get(goal.ratio)
            spread = ratio and ratio[goal.figure]
            if spread:
                found.append(
                    {
                        "what": goal.what,
                        "contestant": contestant,
                        "model": model,
                        "precision": goal.precision,
                        "against": ratio["against"],
                        "limit": goal.limit,
                        "measured": spread["median"],
                        "lowest": spread["lowest"],
                        "highest": spread["highest"],
                        "reached": spread["median"] <= goal.limit,
                    }
                )
    return found
