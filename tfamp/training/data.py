"""All that `Model.fit` takes as data, as the batches that it would train on.

Keras's own data adapters do the work, so that the order of rows is that of
`Model.fit` for the same seed, and a partial last batch is whole.
"""

import re
import types
import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from tfamp import keras_internals, tensorflow_internals
from tfamp.checkpoint.data_position import made_anew
from tfamp.errors import InputError
from tfamp.training.warning import warn

# Datasets that a fit of this process has read from.
_used: weakref.WeakSet[tf.data.Dataset] = weakref.WeakSet()


class Batches:
    """The batches of one call of fit, evaluate or predict.

    Args:
        x: arrays, or anything that yields batches.
        y: targets, for arrays.
        sample_weight: a weight for each row, for arrays.
        strategy: who shares the batches.
        batch_size: rows of a global batch, for arrays; None for 32.
        steps: batches to take per epoch.
        shuffle: as in `Model.fit`.
        class_weight: as in `Model.fit`.

    Attributes:
        dataset: global batches.
        steps: batches to take per epoch; None for all there are.
        count: batches that there are, or None where the data cannot tell.
        is_once: whether they can be gone through only once.
        restarts: whether each epoch begins with the first batch, however many
            steps it has: the workers of a `PyDataset` without end do.

    Raises:
        InputError: for what Keras does not take.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        strategy: tf.distribute.Strategy,
        batch_size: int | None = None,
        steps: int | None = None,
        shuffle: bool | str = False,
        class_weight: dict[int, float] | None = None,
    ):
        if x is None:
            raise InputError(
                "There are no data: x=None; pass arrays or a dataset."
            )
        most = keras.config.max_steps_per_epoch()
        if most and (steps is None or most < steps):
            warn(f"Limiting steps_per_epoch to {most}")
            steps = most
        self.steps = steps
        self.is_once = isinstance(x, types.GeneratorType)
        self._source = x if isinstance(x, tf.data.Dataset) else None
        try:
            self._adapter = keras_internals.data_adapter(
                x,
                y,
                sample_weight,
                batch_size=batch_size,
                steps=steps,
                shuffle=shuffle,
                class_weight=class_weight,
            )
            dataset = self._adapter.get_tf_dataset()
        except (TypeError, ValueError) as error:
            raise InputError(one_line(error)) from None
        if not isinstance(dataset, tf.data.Dataset):
            raise InputError(
                f"Data of type {type(dataset).__name__} are split already; "
                "pass the tf.data.Dataset of global batches."
            )
        self.dataset = _with_none(dataset)
        self.count = self._adapter.num_batches
        self.restarts = (
            self.count is None
            and getattr(self._adapter, "enqueuer", None) is not None
        )
        # A generator is not begun anew: what is looked at is not trained on.
        self._to_look_at = self._first_alone() if self.is_once else None
        if is_multi_worker(strategy):
            self._check_workers(x, shuffle)

    def change(
        self, change: Callable[[tf.data.Dataset], tf.data.Dataset]
    ) -> None:
        """Makes other batches out of them."""
        changed = change(self.dataset)
        if changed is not self.dataset:
            self.dataset = changed
            count = int(changed.cardinality().numpy())
            self.count = None if count < 0 else count
            if self._to_look_at is not None:
                self._to_look_at = change(self._to_look_at)

    def first(self) -> Any:
        """A batch to look at; none is lost by it."""
        dataset = self._to_look_at
        return next(iter(self.dataset if dataset is None else dataset))

    def _first_alone(self) -> tf.data.Dataset | None:
        """The first batch of a generator; None where it is not dense."""
        spec = self.dataset.element_spec
        values = tf.nest.flatten(
            keras_internals.first_of_generator(self._adapter)
        )
        specs = tf.nest.flatten(spec)
        if not all(isinstance(each, tf.TensorSpec) for each in specs):
            return None
        tensors = [
            tf.convert_to_tensor(value, each.dtype)
            for value, each in zip(values, specs, strict=True)
        ]
        batch = tf.nest.pack_sequence_as(spec, tensors)
        return tf.data.Dataset.from_tensors(batch)

    def warn_of_batch_size(self, name: str, batch_size: int | None) -> None:
        """Says that a batch size means nothing to what yields batches."""
        is_array = keras_internals.is_array_adapter(self._adapter)
        if batch_size is not None and not is_array:
            warn(
                f"{name}={batch_size} is ignored: the data come in batches "
                "already; choose their size where they are made."
            )

    def note_use(self) -> None:
        """From now on the caller's dataset is not as it was made."""
        if self._source is not None:
            _used.add(self._source)

    def begin_anew(self) -> None:
        """Goes back to the beginning of a dataset that a fit used before."""
        if self._source is not None and self._source in _used:
            self.dataset = made_anew(self.dataset)

    def begin_epoch(self) -> None:
        self._adapter.on_epoch_begin()

    def end_epoch(self) -> None:
        self._adapter.on_epoch_end()

    def place(self, epochs: int, steps: int) -> tuple[int, int]:
        """Where so many epochs and steps end: whole passes, and batches.

        With a number of steps per epoch, an epoch goes on where the one
        before stopped, and ends where the data do.
        """
        if self.steps is None:
            return epochs, steps
        if self.restarts:
            return 0, steps
        if self.count is None:
            return 0, epochs * self.steps + steps
        passes = seen = 0
        for _ in range(epochs):
            seen = min(seen + self.steps, self.count)
            if seen == self.count:
                passes, seen = passes + 1, 0
        return passes, seen + steps

    def _check_workers(self, x: Any, shuffle: bool | str) -> None:
        is_array = keras_internals.is_array_adapter(self._adapter)
        if is_array and shuffle and not tensorflow_internals.has_global_seed():
            raise InputError(
                "Workers that shuffle arrays need one seed, to see one order: "
                "call keras.utils.set_random_seed(seed) on each, or pass "
                "shuffle=False."
            )
        if not is_array and not isinstance(x, tf.data.Dataset):
            logging.warning(
                "A %s cannot be split: each worker reads all of it and keeps "
                "its rows, so that it must yield the same batches on each.",
                type(x).__name__,
            )


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Whether other processes take part."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    here = len(strategy.extended.worker_devices)
    return here < strategy.num_replicas_in_sync


def validation_arguments(validation_data: Any) -> tuple[Any, Any, Any]:
    """x, y and sample_weight of what was given as `validation_data`."""
    try:
        return keras.utils.unpack_x_y_sample_weight(validation_data)
    except ValueError as error:
        raise InputError(one_line(error)) from None


def split(
    x: Any, y: Any, sample_weight: Any, validation_split: float
) -> tuple[Any, Any]:
    """Training and validation arrays: the first rows, and the last."""
    try:
        return keras_internals.train_validation_split(
            (x, y, sample_weight), validation_split
        )
    except (TypeError, ValueError) as error:
        raise InputError(one_line(error)) from None


def _with_none(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Keras's adapters give an Optional where a batch has a None."""
    specs = tf.nest.flatten(dataset.element_spec)
    if not any(isinstance(spec, tf.OptionalSpec) for spec in specs):
        return dataset

    def convert(*batch):
        batch = keras.tree.map_structure(
            lambda value: (
                None if isinstance(value, tf.experimental.Optional) else value
            ),
            batch,
        )
        return batch if isinstance(dataset.element_spec, tuple) else batch[0]

    return dataset.map(convert)


def one_line(error: Exception) -> str:
    """An error of Keras without colors, line breaks and all arguments."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))
    text = " ".join(text.split("\nArguments received by")[0].split())
    return text if len(text) < 600 else f"{text[:597]}..."
