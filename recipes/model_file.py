"""A trained model as a file that is whole at any time."""

import os
import pathlib

import keras


def save(model: keras.Model, path: pathlib.Path) -> None:
    """Writes a `.keras` file; one that is there is replaced as a whole."""
    temporary = path.with_name(f"new-{path.name}")
    model.save(temporary)
    os.replace(temporary, path)
