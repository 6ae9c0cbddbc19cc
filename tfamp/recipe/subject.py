"""The model and the data of a recipe, as its `train` would have them."""

import dataclasses
import types
from typing import Any

import keras
import tensorflow as tf

from tfamp.precision.maps import reach_pathless
from tfamp.recipe.run_config import start


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a command looks at.

    Attributes:
        model: compiled, not trained.
        train_batches: the training data.
        eval_batches: the data to evaluate on.
    """

    model: keras.Model
    train_batches: tf.data.Dataset
    eval_batches: tf.data.Dataset


def open_subject(recipe: types.ModuleType, config: Any) -> Subject:
    """Builds a recipe's model and data in its precision and strategy.

    Sets the process's global seed and Keras policy.

    Args:
        recipe: as `tfamp.recipe.load_recipe` gives it, or
            `tfamp.recipe.saved_model`.
        config: an instance of its `Config`.

    Raises:
        InputError: for a config that the recipe or tfamp cannot use.
    """
    # A saved model has a precision before one is asked for.
    strategy = getattr(recipe, "start", start)(config)
    train_batches, eval_batches = recipe.make_datasets(config)
    with strategy.scope():
        model = recipe.build_model(config)
    reach_pathless(model)
    return Subject(model, train_batches, eval_batches)
