"""A saved model in the place of a recipe, for commands that only look.

`tfamp lint model.keras`, `tfamp probe model.keras --data=batches.npz`. The file
of arrays holds `x`, `y` and perhaps `sample_weight`, the rows of each first; a
model of several named inputs or outputs has `x/NAME` and `y/NAME`.
"""

import dataclasses
import importlib
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

from tfamp.errors import InputError, did_you_mean
from tfamp.recipe.flags import check_ranges, flag

if TYPE_CHECKING:
    import keras
    import numpy as np
    import tensorflow as tf

SUFFIX = ".keras"
# Of `precision`: what the layers of the file say.
_AS_SAVED = "saved"
_PARTS = ("x", "y", "sample_weight")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of a saved model."""

    model_file: str = flag("", "set by the command")
    data: str = flag("", "an .npz file with arrays x and y; none if empty")
    modules: tuple[str, ...] = flag(
        (), "imported first: they register the model's own layers"
    )
    precision: str = flag(_AS_SAVED, "to load it in; saved: that of the file")
    strategy: str = flag("one_device", "one_device or mirrored")
    num_devices: int | None = flag(None, "devices to use; all if not given")
    batch_size: int = flag(32, "rows of the data in a batch", minimum=1)
    seed: int = flag(0, "of dropout and the like", minimum=0)

    def __post_init__(self):
        check_ranges(self)


def start(config: Config) -> "tf.distribute.Strategy":
    """Begins as a recipe does; in float32 where the file has a precision."""
    from tfamp.recipe import run_config

    if config.precision == _AS_SAVED:
        config = dataclasses.replace(config, precision="float32")
    return run_config.start(config)


def make_datasets(config: Config) -> "tuple[tf.data.Dataset, tf.data.Dataset]":
    """The rows of the file of arrays, twice; none without such a file.

    Raises:
        InputError: the file cannot be read, or its arrays are no batches.
    """
    import tensorflow as tf

    if not config.data:
        nothing = tf.data.Dataset.from_tensors(0).take(0)
        return nothing, nothing
    rows = tf.data.Dataset.from_tensor_slices(_batch(config.data))
    batches = rows.batch(config.batch_size)
    return batches, batches


def build_model(config: Config) -> "keras.Model":
    """Loads the model.

    Raises:
        InputError: it cannot be loaded in that precision, or here.
    """
    from tfamp.saving.load import load_model

    for name in config.modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"--modules={name}: {error}.") from error
    precision = None if config.precision == _AS_SAVED else config.precision
    try:
        with warnings.catch_warnings():
            # No step is applied: moments of another layout are not missed.
            warnings.filterwarnings("ignore", "Skipping variable loading")
            return load_model(config.model_file, precision)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{config.model_file!r} cannot be loaded: {reason} Layers of your "
            "own are found if --modules names the modules that register them."
        ) from error


def refuse(name: str) -> InputError:
    """What a command that trains says of such a file."""
    return InputError(
        f"{name!r} is a saved model, and this command needs a recipe, to "
        "build or train it anew. `tfamp new my_model` writes one, whose "
        "build_model can return tfamp.load_model of it; lint, compare, probe, "
        "tune, export and portability take the file itself."
    )


def check_file(name: str) -> None:
    """Looks for the file before anything else is loaded.

    Raises:
        InputError: it is not there.
    """
    file = pathlib.Path(name).expanduser()
    if not file.exists():
        known = [other.name for other in file.parent.glob(f"*{SUFFIX}")]
        folder = name.removesuffix(file.name)
        raise InputError(
            f"There is no file {name!r}; expected what model.save() wrote."
            f"{did_you_mean(file.name, known, folder)}"
        )


def _batch(path: str) -> Any:
    """What a step is given: `(x, y)` or `(x, y, sample_weight)`."""
    arrays = _arrays(path)
    parts = {part: _part(arrays, part) for part in _PARTS}
    others = [n for n in arrays if n.partition("/")[0] not in _PARTS]
    if parts["x"] is None or others:
        raise InputError(
            f"{path!r} holds {', '.join(arrays) or 'nothing'}; expected "
            "arrays x, y and perhaps sample_weight, or x/NAME for each input, "
            "as np.savez(FILE, x=x, y=y) writes them."
        )
    lengths = {name: len(a) if a.ndim else 0 for name, a in arrays.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        said = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise InputError(
            f"{path!r}: every array needs the same rows, at least one; these "
            f"have: {said}."
        )
    return tuple(part for part in parts.values() if part is not None)


def _arrays(path: str) -> "dict[str, np.ndarray]":
    import numpy as np

    file = pathlib.Path(path).expanduser()
    try:
        # Without pickles: no code of the file is run.
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise ValueError("one array without a name")
        with found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError) as error:
        raise InputError(
            f"--data={path} cannot be read ({error}); expected an .npz file, "
            "as np.savez(FILE, x=x, y=y) writes it."
        ) from error


def _part(arrays: "dict[str, np.ndarray]", part: str) -> Any:
    if part in arrays:
        return arrays[part]
    named = {
        name.partition("/")[2]: array
        for name, array in arrays.items()
        if name.startswith(f"{part}/")
    }
    return named or None
