"""Which callbacks run on this worker, and which of them watch batches."""

from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.distribute.consensus import is_chief
from tfamp.training.autolog import Autolog
from tfamp.training.callbacks import FILE_WRITERS, ProgressBar

# Methods of `Callback`, by what is going on.
_BATCH_HOOKS = {
    "train": (
        "on_batch_begin",
        "on_batch_end",
        "on_train_batch_begin",
        "on_train_batch_end",
    ),
    "test": ("on_test_batch_begin", "on_test_batch_end"),
    "predict": ("on_predict_batch_begin", "on_predict_batch_end"),
}


def flattened(callbacks: Any) -> list[keras.callbacks.Callback]:
    """All callbacks of what `Model.fit` takes: None, one, lists, in order.

    A `CallbackList` of a class of its own stays whole: it may do more.
    """
    if type(callbacks) is keras.callbacks.CallbackList:
        callbacks = callbacks.callbacks
    found = []
    for each in tf.nest.flatten(callbacks):
        if type(each) is keras.callbacks.CallbackList:
            found += flattened(each)
        elif each is not None:
            found.append(each)
    return found


def callbacks_here(
    callbacks: list[keras.callbacks.Callback],
    strategy: tf.distribute.Strategy,
) -> list[keras.callbacks.Callback]:
    """Those that run on this worker: of several, one writes files.

    All others run everywhere, since they may set the learning rate or stop.
    """
    if is_chief(strategy):
        return list(callbacks)
    writers = (*FILE_WRITERS, Autolog)
    return [each for each in callbacks if not isinstance(each, writers)]


def keep_files(callbacks: keras.callbacks.CallbackList) -> None:
    """A run that goes on adds to its table; a new one begins it anew."""
    for each in flattened(callbacks):
        if isinstance(each, keras.callbacks.CSVLogger):
            each.append = True


def watch_batches(callbacks: list[keras.callbacks.Callback], what: str) -> bool:
    """Whether one of them wants to see each batch.

    Args:
        callbacks: the callbacks.
        what: "train", "test" or "predict".
    """
    return any(_watches(each, what) for each in callbacks)


def stop_at_nan(callbacks: list[keras.callbacks.Callback]) -> bool:
    """Whether a loss that is not a number is to end training.

    The mean loss of an epoch leaves such batches out; these must see them.
    """
    kind = keras.callbacks.TerminateOnNaN
    return any(isinstance(each, kind) for each in callbacks)


def _watches(callback: keras.callbacks.Callback, what: str) -> bool:
    # Of our own, these take reports whenever they come.
    takes_reports = getattr(type(callback), "tfamp_takes_reports", False)
    if isinstance(callback, ProgressBar) or takes_reports:
        return False
    if isinstance(callback, keras.callbacks.CallbackList):
        return True
    return any(
        hook in vars(callback) or _does_something(callback, hook)
        for hook in _BATCH_HOOKS[what]
    )


def _does_something(callback: keras.callbacks.Callback, hook: str) -> bool:
    """Whether a hook of its class is more than Keras's empty one."""
    method = getattr(type(callback), hook)
    if method is getattr(keras.callbacks.Callback, hook):
        return False
    # These define their hooks whether or not they were asked to use them.
    for cls in (
        keras.callbacks.ModelCheckpoint,
        keras.callbacks.BackupAndRestore,
    ):
        if isinstance(callback, cls) and method is getattr(cls, hook):
            return callback.save_freq not in ("epoch", False)
    if isinstance(callback, keras.callbacks.TensorBoard) and method is getattr(
        keras.callbacks.TensorBoard, hook
    ):
        return bool(
            callback.update_freq != "epoch"
            or callback.write_steps_per_second
            or keras_internals.profiles_batches(callback)
        )
    return True
