"""A file of low-rank weights: a few kilobytes beside a base of any size."""

import os
import pathlib
import zipfile

import keras
import numpy as np

from recipes.low_rank import branches
from tfamp.errors import InputError


def save(model: keras.Model, path: pathlib.Path) -> None:
    """Writes A, B and scale of each branch to an `.npz` file.

    Args:
      model: made by `low_rank.adapt`.
      path: with the ending `.npz`; a file there is replaced as a whole.
    """
    temporary = path.with_name(f"new-{path.name}")
    np.savez(temporary, **_arrays(model))
    os.replace(temporary, path)


def load(model: keras.Model, path: str | os.PathLike) -> None:
    """Reads what `save` wrote into a model of the same base and branches.

    Args:
      model: made by `low_rank.adapt`.
      path: of the file.

    Raises:
      InputError: there is no such file, or it goes with other branches.
    """
    if not zipfile.is_zipfile(path):
        found = "is no .npz file" if os.path.exists(path) else "is not there"
        raise InputError(
            f"{os.fspath(path)!r} {found}; expected low-rank weights."
        )
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    described, expected = map(_described, (arrays, _arrays(model)))
    for name in sorted({*described, *expected}):
        there, here = described.get(name), expected.get(name)
        if there != here:
            raise InputError(
                f"{os.fspath(path)!r} goes with another model: {name} is "
                f"{there or 'missing'} there, and {here or 'missing'} in the "
                "model."
            )
    for name, branch in branches(model).items():
        for part in ("a", "b"):
            branch[part].assign(arrays[f"{name}/{part}"])


def _arrays(model: keras.Model) -> dict[str, np.ndarray]:
    return {
        f"{name}/{part}": np.asarray(value)
        for name, branch in branches(model).items()
        for part, value in branch.items()
    }


def _described(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Shapes, and the scales themselves."""
    return {
        name: " by ".join(map(str, array.shape)) or f"{float(array):g}"
        for name, array in arrays.items()
    }
