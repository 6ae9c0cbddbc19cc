"""Where those functions are that call, differentiate and store."""

from typing import Any

import tensorflow as tf
from tensorflow.python.ops import custom_gradient, resource_variable_ops

# Where TensorFlow calls a function with a gradient of its own.
CUSTOM_GRADIENT_CALLS = ("_eager_mode_decorator", "_graph_mode_decorator")

# What calls a `tf.function`.
TRACED_CALL: tuple[Any, str] = (type(tf.function(lambda: None)), "__call__")


def gradient_functions() -> list[tuple[Any, str]]:
    """What runs gradients of operations, by owner and name."""
    return [
        (tf.GradientTape, "gradient"),
        (tf.GradientTape, "jacobian"),
        (tf.GradientTape, "batch_jacobian"),
        (tf, "gradients"),
        *((custom_gradient, name) for name in CUSTOM_GRADIENT_CALLS),
    ]


def storing_functions() -> list[tuple[Any, str]]:
    """What stores tensors in something of one dtype, by owner and name."""
    # The second has some of the first's, wrapped.
    classes = (
        resource_variable_ops.BaseResourceVariable,
        resource_variable_ops.ResourceVariable,
    )
    return [
        *(
            (each, name)
            for each in classes
            for name in ("assign", "assign_add", "assign_sub")
            if name in vars(each)
        ),
        *((tf.TensorArray, name) for name in ("write", "unstack", "scatter")),
    ]
