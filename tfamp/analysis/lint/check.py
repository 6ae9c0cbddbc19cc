"""What in a model will go wrong in 16 bits, found before it trains.

Layers, policies, optimizer and strategy are looked at as they are; what the
model computes is traced as a graph and looked at by dtype, which finds a
`keras.ops.softmax` in code of the user's own too. No step is run. Afterwards
the model, its variables and the random state are bit for bit what they were.
"""

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfamp.analysis.lint import (
    equality,
    layers,
    losses,
    outputs,
    own_losses,
    ranges,
    replicas,
    scaling,
    softmax,
)
from tfamp.analysis.lint.findings import (
    SEVERITIES,
    WARNING,
    Finding,
    Rule,
)
from tfamp.analysis.lint.view import View, look
from tfamp.errors import InputError
from tfamp.precision.sensitive_layers import is_built

NOT_TRACED = Rule(
    "not-traced",
    "A part of the model could not be traced, and the rules for what it "
    "computes were not applied to it.",
)

_GROUPS = (
    outputs,
    softmax,
    ranges,
    equality,
    losses,
    scaling,
    replicas,
    own_losses,
    layers,
)

RULES = tuple(rule for group in _GROUPS for rule in group.RULES)
RULES = (*RULES, NOT_TRACED)


def lint(model: keras.Model, batch: Any = None) -> list[Finding]:
    """Finds what in a model will go wrong in 16 bits, before it trains.

    Args:
        model: a built model: functional, sequential or subclassed. What needs
            a compiled one (optimizer, loss, metrics) is skipped for others.
        batch: an element of the training data, `(x, y, sample_weight)` or
            less of them, or a dataset, of which the first is taken. Its values
            are looked at for their range. Without one, shapes and labels are
            guessed from the model's own.

    Returns:
        The findings, the gravest first; none for a clean model.

    Raises:
        InputError: what came is no model, or is not built.
    """
    if not isinstance(model, keras.Model):
        raise InputError(
            f"Expected a keras.Model, got {type(model).__name__}; put a layer"
            " into keras.Sequential([layer])."
        )
    if not is_built(model):
        raise InputError(
            f"Model {model.name!r} is not built; call it once on a batch, or"
            " model.build(input_shape), before lint."
        )
    if isinstance(batch, tf.data.Dataset):
        batch = next(iter(batch), None)
    view = look(model, batch)
    findings = [each for group in _GROUPS for each in group.check(view)]
    findings += _not_traced(view)
    # Training and inference show the same; a layer tells a thing once.
    told = {(each.rule, each.layer, each.fix): each for each in findings}
    return sorted(
        told.values(), key=lambda each: SEVERITIES.index(each.severity)
    )


def _not_traced(view: View) -> Iterator[Finding]:
    for problem in view.untraced:
        yield Finding(
            NOT_TRACED.name,
            WARNING,
            "",
            f"Not traced, {problem}",
            "tfamp.lint(model, batch=next(iter(dataset)))",
        )
