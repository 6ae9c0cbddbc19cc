"""Keras's `SwapEMAWeights` where the weights it swaps are in shards.

It swaps what the optimizer was built with: the masters. What the model reads
must be what they are then, and what was set before must be in them.
"""

from collections.abc import Sequence

import keras

from tfamp.scaling.optimizer import LossScaleOptimizer


def followed(
    callbacks: Sequence[keras.callbacks.Callback], model: keras.Model
) -> list[keras.callbacks.Callback]:
    """The callbacks; around each that swaps, what keeps the model with it.

    Args:
        callbacks: those of a `CallbackList`.
        model: whose optimizer may be in shards.
    """
    # A model that only predicts may not be compiled.
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, LossScaleOptimizer) or not optimizer.shard:
        return list(callbacks)
    found: list[keras.callbacks.Callback] = []
    for each in callbacks:
        if isinstance(each, keras.callbacks.SwapEMAWeights):
            found += [_Shards("follow_all"), each, _Shards("publish_all")]
        else:
            found.append(each)
    return found


class _Shards(keras.callbacks.Callback):
    """Calls a method of the shards wherever averages may be swapped."""

    def __init__(self, method: str):
        super().__init__()
        self._method = method

    def _call(self, *_, **__) -> None:
        shards = self.model.optimizer.shards
        if shards is not None:
            getattr(shards, self._method)()

    on_epoch_begin = on_epoch_end = _call
    on_test_begin = on_test_end = _call
    on_predict_begin = on_predict_end = _call
