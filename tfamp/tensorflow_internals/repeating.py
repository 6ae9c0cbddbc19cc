"""What was asked of a process so that its numbers repeat."""

import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import config
from tensorflow.python.ops import stateful_random_ops


def is_op_determinism_enabled() -> bool:
    """Whether `tf.config.experimental.enable_op_determinism()` was called."""
    return config.is_op_determinism_enabled()


def has_global_seed() -> bool:
    """Whether TensorFlow draws from a seed that was set.

    `tf.compat.v1.get_seed`, asked without a seed, changes what is drawn next;
    asked with one, it does not say whether there is another.
    """
    return context.global_seed() is not None


def global_generator() -> tf.random.Generator | None:
    """`tf.random.get_global_generator()`, which makes one where there is none.

    Here it is None then.
    """
    return stateful_random_ops.global_generator
