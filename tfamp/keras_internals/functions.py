"""Where those functions are that compute, cast, store, differentiate, apply."""

import sys
from typing import Any

import keras
import tensorflow as tf

# Where TensorFlow calls a function with a gradient of its own.
CUSTOM_GRADIENT_CALLS = ("_eager_mode_decorator", "_graph_mode_decorator")

# What calls a `tf.function`.
TRACED_CALL: tuple[Any, str] = (
    sys.modules[
        "tensorflow.python.eager.polymorphic_function.polymorphic_function"
    ].Function,
    "__call__",
)


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


def gradient_functions() -> list[tuple[Any, str]]:
    """What runs gradients of operations, by owner and name."""
    module = sys.modules["tensorflow.python.ops.custom_gradient"]
    return [
        (tf.GradientTape, "gradient"),
        (tf.GradientTape, "jacobian"),
        (tf.GradientTape, "batch_jacobian"),
        (tf, "gradients"),
        *((module, name) for name in CUSTOM_GRADIENT_CALLS),
    ]


def storing_functions() -> list[tuple[Any, str]]:
    """What stores tensors in something of one dtype, by owner and name."""
    module = sys.modules["tensorflow.python.ops.resource_variable_ops"]
    # The second has some of the first's, wrapped.
    classes = (module.BaseResourceVariable, module.ResourceVariable)
    return [
        *(
            (each, name)
            for each in classes
            for name in ("assign", "assign_add", "assign_sub")
            if name in vars(each)
        ),
        *((tf.TensorArray, name) for name in ("write", "unstack", "scatter")),
    ]


def applying_functions() -> list[tuple[Any, str]]:
    """What updates variables by gradients, by owner and name."""
    base = keras.src.optimizers.base_optimizer.BaseOptimizer
    return [(base, "apply"), (keras.optimizers.LossScaleOptimizer, "apply")]
