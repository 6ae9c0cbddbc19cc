"""Which of a recipe's final metrics is judged, and which way is better."""

from collections.abc import Iterable

from tfamp.errors import InputError

# What `tfamp.recipe.final_metrics` adds; no metric of the model.
BOOKKEEPING = ("skipped_steps", "loss_scale")
_SMALLER_IS_BETTER = (
    "loss",
    "error",
    "perplexity",
    "crossentropy",
    "distance",
    "divergence",
    "entropy",
    "bits",
    "mse",
    "mae",
    "mape",
    "msle",
)


def choose_metric(names: Iterable[str], wanted: str | None) -> str:
    """The metric to judge.

    Args:
        names: of the metrics that a recipe's `train` returned.
        wanted: the one that the user named; None for the first of: an
            accuracy, the shortest of these names; the loss; any.

    Raises:
        InputError: there is no such metric, or none at all.
    """
    names = list(names)
    if wanted is not None:
        if wanted not in names:
            raise InputError(
                f"The recipe's train returns no metric {wanted!r}; expected "
                f"one of {', '.join(names) or 'none: it returns nothing'}."
            )
        return wanted
    judged = [name for name in names if name not in BOOKKEEPING]
    accuracies = [name for name in judged if "accuracy" in name.lower()]
    if not judged:
        raise InputError(
            "The recipe's train returns no metric; expected a dict such as "
            "{'loss': 0.1, 'accuracy': 0.9}."
        )
    if accuracies:
        return min(accuracies, key=len)
    return "loss" if "loss" in judged else judged[0]


def is_greater_better(name: str) -> bool:
    """Whether more of a metric is better, by its name."""
    return not any(word in name.lower() for word in _SMALLER_IS_BETTER)
