"""Every private detail of TensorFlow that tfamp leans on, one function each.

TensorFlow 2.19 to 2.21 has no public way to do these things.
tests/test_tensorflow_internals.py fails when a new TensorFlow moves one of
them. What `tf.__internal__` exports, for Keras, is used where it is needed.
"""

from tfamp.tensorflow_internals.coordination import (
    abort_collectives,
    bound_joining,
    check_worker,
    put_text,
    text_under,
)
from tfamp.tensorflow_internals.functions import (
    CUSTOM_GRADIENT_CALLS,
    TRACED_CALL,
    gradient_functions,
    storing_functions,
)
from tfamp.tensorflow_internals.repeating import (
    global_generator,
    has_global_seed,
    is_op_determinism_enabled,
)
from tfamp.tensorflow_internals.runtime import (
    forget_functions,
    register_functions,
    run_operation,
)
from tfamp.tensorflow_internals.strategies import (
    replace_first_values,
    separate_collectives,
)
from tfamp.tensorflow_internals.traces import (
    differentiated_within,
    graph_function,
    is_compiled_by_xla,
)

__all__ = [
    "CUSTOM_GRADIENT_CALLS",
    "TRACED_CALL",
    "abort_collectives",
    "bound_joining",
    "check_worker",
    "differentiated_within",
    "forget_functions",
    "global_generator",
    "gradient_functions",
    "graph_function",
    "has_global_seed",
    "is_compiled_by_xla",
    "is_op_determinism_enabled",
    "put_text",
    "register_functions",
    "replace_first_values",
    "run_operation",
    "separate_collectives",
    "storing_functions",
    "text_under",
]
