"""All that `Model.fit` takes as data, as the batches that it would train on.

Keras's own data adapters do the work, so that the order of rows is that of
`Model.fit` for the same seed, and a partial last batch is whole.
"""

import warnings
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.errors import InputError


class Batches:
    """The batches of one call of fit, evaluate or predict.

    Attributes:
        dataset: global batches.
        steps: batches per epoch that were asked for; None for all there are.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        shuffle: bool | str = False,
        class_weight: dict[int, float] | None = None,
    ):
        most = keras.config.max_steps_per_epoch()
        if most and (steps is None or most < steps):
            warnings.warn(f"Limiting steps_per_epoch to {most}", stacklevel=4)
            steps = most
        self.steps = steps
        if keras_internals.is_dataset(x):
            # Shuffled, if at all, where it was made: no word about it.
            shuffle = False
            if batch_size is not None:
                raise InputError(
                    f"batch_size={batch_size}, but a {type(x).__name__} is "
                    "batched already; leave batch_size out."
                )
        if x is None:
            raise InputError("x=None; expected arrays or a dataset.")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`shuffle=True` was passed")
                self._adapter = keras_internals.data_adapter(
                    x,
                    y,
                    sample_weight,
                    batch_size=batch_size,
                    steps=steps,
                    shuffle=shuffle,
                    class_weight=class_weight,
                )
            self.dataset = self._adapter.get_tf_dataset()
        except (TypeError, ValueError) as error:
            raise InputError(_one_line(error)) from None

    @property
    def count(self) -> int | None:
        """Batches in the data, or None where they cannot tell."""
        return self._adapter.num_batches

    def begin_epoch(self) -> None:
        self._adapter.on_epoch_begin()

    def end_epoch(self) -> None:
        self._adapter.on_epoch_end()


def split(
    x: Any, y: Any, sample_weight: Any, validation_split: float
) -> tuple[Any, Any]:
    """Training and validation arrays: the first rows, and the last."""
    try:
        return keras_internals.train_validation_split(
            (x, y, sample_weight), validation_split
        )
    except (TypeError, ValueError) as error:
        raise InputError(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 400 else f"{text[:397]}..."
