"""Where those functions of Keras are that compute, cast and apply."""

from typing import Any

import keras


def backend_modules() -> list:
    """The modules whose functions `keras.ops` and `keras.random` call."""
    backend = keras.src.backend.tensorflow
    return [
        backend.core,
        backend.image,
        backend.linalg,
        backend.math,
        backend.nn,
        backend.numpy,
        backend.random,
    ]


def casts_of_keras() -> list[tuple[Any, str]]:
    """What Keras itself casts by, as a layer its inputs, by owner and name."""
    backend = keras.src.backend
    return [(backend, "cast"), (backend, "convert_to_tensor")]


def casts_of_users() -> list[tuple[Any, str]]:
    """What the code of a layer casts by, before dtypes become names."""
    ops = keras.src.ops
    return [
        (owner, name)
        for owner in (keras.ops, ops, ops.core)
        for name in ("cast", "convert_to_tensor")
    ]


def applying_functions() -> list[tuple[Any, str]]:
    """What updates variables by gradients, by owner and name."""
    base = keras.src.optimizers.base_optimizer.BaseOptimizer
    return [(base, "apply"), (keras.optimizers.LossScaleOptimizer, "apply")]
