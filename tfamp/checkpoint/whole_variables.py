"""Variables in shards, as a checkpoint holds them: whole.

A checkpoint then says nothing of how many replicas there were, or whether
there were shards at all: a run goes on with any number, and without.
"""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp.scaling.optimizer import LossScaleOptimizer
from tfamp.scaling.shards import Piece, Shards

# As TensorFlow calls what it saves of a variable.
_KEY = "VARIABLE_VALUE"


class WholeVariable:
    """Stands for a variable of which each replica has a part.

    Args:
        shards: where the parts are.
        piece: of a moment, or the weight of the model whose master it is.

    Attributes:
        path, shape, dtype: of the whole.
        value: what TensorFlow saves and restores.
    """

    def __init__(self, shards: Shards, piece: Piece | keras.Variable):
        is_moment = isinstance(piece, Piece)
        weight = piece.weight if is_moment else piece
        self.path = piece.whole_path if is_moment else piece.path
        self.shape = weight.shape
        self.dtype = weight.dtype
        self.value = _Value(self.dtype)
        self._shards = shards
        self._piece = piece

    def read(self) -> None:
        """Gets the whole from all replicas; all workers call it together."""
        self.value.array = self._shards.gather_whole(self._piece)

    def write(self) -> None:
        """Gives each replica its part of what was restored."""
        self._shards.write_whole(self._piece, self.value.array)
        self.forget()

    def forget(self) -> None:
        """Lets go of the memory."""
        self.value.array = None


def standing_for(
    variables: Iterable[keras.Variable],
    optimizers: Iterable[keras.optimizers.Optimizer],
) -> list[Any]:
    """The variables, those in shards replaced by a `WholeVariable`."""
    all_shards = [
        each.shards
        for each in optimizers
        if isinstance(each, LossScaleOptimizer) and each.shards is not None
    ]

    def stand_in(variable):
        for shards in all_shards:
            if shards.holds(variable):
                return WholeVariable(shards, variable)
            piece = shards.moment(variable)
            if piece is not None:
                return WholeVariable(shards, piece)
        return variable

    return [*map(stand_in, variables)]


class _Value(tf.__internal__.tracking.Trackable):
    """An array on the host, saved as a variable is."""

    # Read by who asks variables whether replicas hold values of their own.
    synchronization = tf.VariableSynchronization.AUTO

    def __init__(self, dtype: str):
        self.dtype = tf.as_dtype(dtype)
        self.array: np.ndarray | None = None

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        # To restore it, TensorFlow asks for the name alone.
        array = np.zeros(0) if self.array is None else self.array
        with tf.device("CPU:0"):
            return {_KEY: tf.constant(array, self.dtype)}

    def _restore_from_tensors(self, restored: dict[str, tf.Tensor]) -> None:
        self.array = restored[_KEY].numpy()
