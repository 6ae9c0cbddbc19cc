"""A compiled model and several optimizers, for more than one of these tests."""

import keras
from keras import layers


def compiled_model():
    model = keras.Sequential([layers.Dense(2)])
    model.compile("adam", loss="mse", metrics=["mae"])
    return model


def several_optimizers():
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(0.5, use_ema=True, ema_overwrite_frequency=3),
            {"absent": keras.optimizers.Adam(use_ema=True)},
        )
    )
