"""What must be the same on all workers, said in words or fingerprints."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp.checkpoint.command import options_of
from tfamp.distribute.initial_values import numbers_unlike_the_chiefs
from tfamp.precision.policy import precision_of
from tfamp.version import __version__


def facts_at_begin(
    model: keras.Model,
    dataset: tf.data.Dataset,
    arguments: Mapping[str, Any],
) -> dict[str, str]:
    """Of a call of fit: versions, model, optimizer, data, arguments.

    Args:
        model: compiled and built.
        dataset: global batches.
        arguments: of fit, by name.
    """
    variables = [*model.variables, *model.metrics_variables]
    facts = {
        "versions": (
            f"tfamp {__version__}, Keras {keras.__version__}, TensorFlow "
            f"{tf.__version__}, Python {sys.version.split()[0]}"
        ),
        "precision": precision_of(model),
        "batches": str(dataset.element_spec),
        "loss": _name_of(model.loss),
        "model": "#" + _digest([f"{v.shape} {v.dtype}" for v in variables]),
    }
    for name, value in options_of(model.optimizer).items():
        facts[name] = str(value)
    # The chief's values are in the variables, whatever was asked for here.
    strategy = model.distribute_strategy
    for name, number in numbers_unlike_the_chiefs(strategy).items():
        if name in facts:
            facts[name] = str(number)
    facts |= {name: str(value) for name, value in arguments.items()}
    values = [v.numpy().tobytes() for v in model.trainable_variables]
    return facts | {"weights to begin with": "#" + _digest(values)}


def facts_of_epoch(
    model: keras.Model, first_batch: str | None
) -> dict[str, str]:
    """What may come to differ while they train."""
    facts = {"first batch of this epoch": f"#{first_batch}"}
    rate = options_of(model.optimizer).get("learning_rate")
    return facts if rate is None else facts | {"learning_rate": str(rate)}


def _name_of(loss: Any) -> str:
    """Of one loss, or of all in a structure; addresses say nothing."""
    names = []
    for each in keras.tree.flatten(loss):
        name = getattr(each, "name", None) or getattr(each, "__name__", None)
        is_text = isinstance(each, str)
        names.append(str(name or (each if is_text else type(each).__name__)))
    return ", ".join(names)


def _digest(parts: Sequence[str | bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
