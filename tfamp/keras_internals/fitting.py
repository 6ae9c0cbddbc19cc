"""What `Model.fit`, `evaluate` and `predict` do around their steps."""

from typing import Any

import keras


def data_adapter(
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    batch_size: int | None,
    steps: int | None,
    shuffle: bool | str,
    class_weight: dict[int, float] | None,
) -> Any:
    """What makes batches of all that `Model.fit` takes.

    That `shuffle` says nothing of most kinds is no reason to warn: it is the
    default.
    """
    adapters = keras.src.trainers.data_adapters
    is_shuffled = adapters.array_data_adapter.can_convert_arrays(
        (x, y, sample_weight)
    ) or getattr(x, "num_batches", None)
    return adapters.get_data_adapter(
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        steps_per_epoch=steps,
        shuffle=shuffle if is_shuffled else False,
        class_weight=class_weight,
    )


def is_array_adapter(adapter: Any) -> bool:
    """Whether a data adapter holds arrays."""
    module = keras.src.trainers.data_adapters.array_data_adapter
    return isinstance(adapter, module.ArrayDataAdapter)


def first_of_generator(adapter: Any) -> Any:
    """The first batch, where a data adapter was made of a Python generator.

    Keras has taken it to see what it is, and puts it before the others.
    """
    return adapter._first_batches[0]


def train_validation_split(arrays: Any, validation_split: float) -> Any:
    """The first rows of arrays, and the last, as `Model.fit` splits them."""
    return (
        keras.src.trainers.data_adapters.array_slicing.train_validation_split(
            arrays, validation_split=validation_split
        )
    )


def initial_epoch(model: keras.Model) -> int:
    """The epoch to begin with: `BackupAndRestore` found the ones before."""
    return model._initial_epoch or 0


def forget_initial_epoch(model: keras.Model) -> None:
    """As if `BackupAndRestore` had found nothing."""
    model._initial_epoch = None


def last_of_execution(model: keras.Model, begin: int, end: int) -> int:
    """The batch that callbacks are told a graph call ended with.

    Keras counts an execution (`compile(steps_per_execution=...)`) that the
    end of the data cut short as whole.

    Args:
        model: compiled or not.
        begin: the first batch of the call.
        end: the one after its last.
    """
    whole = model.steps_per_execution
    return (begin + whole if whole > 1 else end) - 1


def profiles_batches(callback: keras.callbacks.TensorBoard) -> bool:
    """Whether `profile_batch` was given to it."""
    return callback._start_batch > 0


def concatenate_outputs(pieces: list[Any]) -> Any:
    """Outputs of batches, one after the other, as `Model.predict` does.

    Ragged where the batches differ in more than their rows; scalars in a row.
    """
    module = keras.src.backend.tensorflow.trainer
    whole = module.potentially_ragged_concat(pieces)
    return module.convert_to_np_if_not_ragged(whole)
