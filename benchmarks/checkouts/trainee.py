"""Trains by the tfamp of one checkout, some steps each time it is told to.

    python trainee.py CHECKOUT CASE PRECISION STEPS

It needs of the checkout only what all versions have: `tfamp.fit` and the
networks of `benchmarks.compare`. A line in is a turn; a line of JSON goes out.
"""

import json
import os
import sys
import time

# One thread computes: how many share a step differs from turn to turn.
os.environ |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfamp
from benchmarks.compare import cases, keras_networks

_CASES = {each.name: each for each in cases.QUICK}
_CASES["mlp_wide"] = cases.Case(
    "mlp_wide",
    cases.Mlp((256, 512, 512, 10)),
    128,
    cases.AdamW(learning_rate=1e-4, weight_decay=0.01),
    steps=1,
)
_TOKENS, _LENGTH, _ROWS, _BATCHES = 200, 32, 32, 4


class _Turns(keras.callbacks.Callback):
    """An epoch is a turn."""

    def __init__(self, steps: int):
        super().__init__()
        self._steps = steps

    def on_epoch_begin(self, epoch, logs=None):
        if not sys.stdin.readline():
            sys.exit()
        self._begin = time.process_time(), time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        end = time.process_time(), time.perf_counter()
        cpu, wall = (
            (late - early) / self._steps * 1e3
            for early, late in zip(self._begin, end, strict=True)
        )
        print(json.dumps({"cpu": cpu, "wall": wall}), flush=True)


def _masked():
    """Labels each token; those that are 0 count for nothing."""
    tokens = keras.Input([_LENGTH], dtype="int32")
    x = layers.Embedding(_TOKENS, 64, mask_zero=True)(tokens)
    x = layers.Dense(_TOKENS)(layers.Dense(128, activation="relu")(x))
    logits = layers.Activation("linear", dtype="float32")(x)
    random = np.random.default_rng(0)
    shape = 2, _BATCHES, _ROWS, _LENGTH
    return keras.Model(tokens, logits), random.integers(_TOKENS, size=shape)


def _network(name: str):
    """A model, and the stacked inputs and labels of its batches."""
    if name == "masked":
        return _masked()
    batches = cases.make_batches(_CASES[name])
    model = keras_networks.build(_CASES[name].network)
    return model, [np.stack(each) for each in zip(*batches, strict=True)]


def train(checkout: str, name: str, precision: str, steps: int) -> None:
    """Trains until nobody tells it to."""
    if not tfamp.__file__.startswith(checkout):
        sys.exit(f"{checkout} was to be measured, and not {tfamp.__file__}.")
    keras.config.set_dtype_policy(precision)
    keras.utils.set_random_seed(0)
    model, (x, y) = _network(name)
    model.compile(
        keras.optimizers.AdamW(1e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    batches = tf.data.Dataset.from_tensor_slices((x, y)).cache().repeat()
    tfamp.fit(
        model,
        batches.take(steps),
        epochs=10**6,
        verbose=0,
        callbacks=[_Turns(steps)],
    )


if __name__ == "__main__":
    train(*sys.argv[1:4], int(sys.argv[4]))
