"""`predict`: the outputs of a model for each row, over any strategy."""

from typing import Any

import keras
import tensorflow as tf

from tfamp.distribute.strategy import distribute_batches
from tfamp.distribute.workers import worker_errors
from tfamp.training import preconditions
from tfamp.training.data import Batches


def predict(
    model: keras.Model,
    x: Any,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    callbacks: Any = None,
    verbose: int | str = 0,
) -> Any:
    """The outputs of a model, rows in the order of x and each once.

    Args:
        model: any Keras model; it need not be compiled.
        x: arrays or batches, as for `fit`; targets are left aside.
        batch_size: rows of a global batch, for arrays; None for 32.
        steps: batches to predict; None for all.
        callbacks: any Keras callbacks.
        verbose: anything but 0 prints how many rows there were.

    Returns:
        NumPy arrays in the structure of the model's outputs; 16-bit floats
        come in float32. On several workers, each gets all rows.

    Raises:
        InputError: for data that cannot be used.
        WorkerLostError: another worker stopped answering.
    """
    raise NotImplementedError
