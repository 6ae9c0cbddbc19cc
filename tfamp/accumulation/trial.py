"""What a kernel is tried with."""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

# Long enough that a stall shows where a kernel has many running sums: lanes of
# vector instructions times their unrolling, and threads.
TERMS = 2**16
# Sums of as many stay within the range of float16.
TERM = 2.0**-3
# A product of 256 that bfloat16 holds: it is 7.3.
FACTOR = 129 / 128

Values = Callable[..., tf.Tensor]


@dataclass(frozen=True)
class Kernel:
    """A kernel that adds, or multiplies, many numbers.

    Attributes:
        trial: runs it on values that a function of shape and value makes.
        inputs: positions of the inputs in its number format; None for all.
        output: what its definition calls its one output.
        adds: whether a node (NodeDef) of it adds so many that it matters.
        types: its attributes that say the number format.
    """

    trial: Callable[[Values], tf.Tensor]
    inputs: tuple[int, ...] | None = (0,)
    output: str = "output"
    adds: Callable[[tf.compat.v1.NodeDef], bool] = lambda node: True
    types: tuple[str, ...] = ("T",)


def data_inputs(node: tf.compat.v1.NodeDef) -> list[str]:
    """The inputs of a node that are tensors."""
    return [each for each in node.input if not each.startswith("^")]
