"""Classes of tfamp that `.keras` files name, and the word about them.

A process that has not imported tfamp does not know them.
"""

import functools
from typing import Any

import keras
from absl import logging

from tfamp import keras_internals

_is_said = False


def registered(cls: Any) -> Any:
    """Registers a class as `tfamp>NAME`; saving one says how to load it."""
    get_config = cls.get_config

    @functools.wraps(get_config)
    def get_config_and_say(self):
        say_how_to_load()
        return get_config(self)

    cls.get_config = get_config_and_say
    return keras.saving.register_keras_serializable(package="tfamp")(cls)


def say_how_to_load() -> None:
    """Once in a process, where a model is saved with such a class."""
    global _is_said
    if _is_said or not keras_internals.is_saving_model():
        return
    _is_said = True
    logging.warning(
        "The model is saved with classes of tfamp: load it with "
        "tfamp.load_model(path), which knows them."
    )
