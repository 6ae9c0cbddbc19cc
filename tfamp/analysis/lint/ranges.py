"""Rules for numbers that 16 bits cannot hold: small, summed up, or large."""

import math
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from tfamp.analysis.lint.findings import ERROR, WARNING, Finding, Rule
from tfamp.analysis.lint.graph import Graph, Node
from tfamp.analysis.lint.ops import MOVES
from tfamp.analysis.lint.outputs import in_float32
from tfamp.analysis.lint.trace import LOSS, METRICS, ForwardTrace
from tfamp.analysis.lint.view import View, is_16_bit, shown, unwrapped
from tfamp.formats import FORMATS

SMALL_EPSILON = Rule(
    "small-epsilon",
    "An epsilon lies below float16's smallest normal number, 6.1e-5: it is 0 "
    "there, or rounded grossly, and protects from no division by zero.",
)
LARGE_SUM = Rule(
    "large-sum",
    "A sum over many numbers is in 16 bits: it overflows, or what is added "
    "last no longer changes it.",
)
INPUT_RANGE = Rule(
    "input-range",
    "The data hold numbers beyond 65504, which become inf in float16.",
)
RULES = (SMALL_EPSILON, LARGE_SUM, INPUT_RANGE)

_FLOAT16 = FORMATS["float16"]
_ADDING = ("Add", "AddV2", "Maximum")
# The position of the operand that must not be 0.
_DIVIDING = {
    "Inv": 0,
    "Log": 0,
    "RealDiv": 1,
    "Reciprocal": 0,
    "Rsqrt": 0,
    "Sqrt": 0,
}
_UP_TO_DIVISION = MOVES | {"Sqrt"}
_SUMS = ("Mean", "Sum")


def check(view: View) -> Iterator[Finding]:
    """Findings about the range and the resolution of numbers."""
    for graph in view.graphs():
        for node in graph.forward():
            if node.dtype == "float16" and node.op in _ADDING:
                yield from _check_epsilon(view, graph, node)
            # Those of losses and metrics are wrong at any size.
            if (
                node.op in _SUMS
                and is_16_bit(node)
                and node.place not in (LOSS, METRICS)
            ):
                yield from _check_sum(view, graph, node)
    yield from _check_optimizers(view)
    if view.batch is not None and view.passes:
        yield from _check_inputs(view, view.passes[0])


def _check_epsilon(view: View, graph: Graph, node: Node) -> Iterator[Finding]:
    for source in graph.sources(node):
        value = graph.constant(source)
        # The traced constant is what is left of it in float16.
        if value is None or value.size == 0:
            continue
        if (
            float(np.abs(value).max()) < _FLOAT16.min_normal
            and _divides(graph, node)
            and _varies(graph, node)
        ):
            yield Finding(
                SMALL_EPSILON.name,
                ERROR,
                shown(node.place),
                "An epsilon that protects a division, root or logarithm is "
                f"{float(np.abs(value).max()):.2g} in float16, below its "
                f"smallest normal number {_FLOAT16.min_normal:.2g}.",
                in_float32(view, node, f"epsilon = {2.0**-13}"),
                node.line,
            )
            return


def _varies(graph: Graph, node: Node) -> bool:
    """Whether it depends on data or weights: constants are what they are."""
    behind = graph.upstream([node], lambda n: True)
    return any(each.op in ("Argument", "Placeholder") for each in behind)


def _divides(graph: Graph, node: Node) -> bool:
    reached = {node.name}
    for each in graph.downstream(
        [node], lambda n: n is node or n.op in _UP_TO_DIVISION
    ):
        position = _DIVIDING.get(each.op)
        if (
            position is not None
            and not each.is_backward
            and position < len(each.inputs)
            and each.inputs[position][0] in reached
        ):
            return True
        reached.add(each.name)
    return False


def _check_sum(view: View, graph: Graph, node: Node) -> Iterator[Finding]:
    if len(node.inputs) < 2:
        return
    shape = graph.input_shape(node, 0)
    axes = graph.constant(graph.sources(node)[1])
    if shape is None or axes is None:
        return
    # A size that is not known counts as 1: what is found is sure.
    count = math.prod(shape[axis] or 1 for axis in np.atleast_1d(axes))
    exact = 2 ** (FORMATS[node.dtype].mantissa_bits + 1)
    if count < exact:
        return
    is_float16 = node.dtype == "float16"
    yield Finding(
        LARGE_SUM.name,
        WARNING,
        node.place,
        f"A {node.op.lower()} over {count} numbers is in {node.dtype}, which "
        f"counts by ones up to {exact}"
        + (" and overflows at 65504." if is_float16 else "."),
        in_float32(
            view,
            node,
            f"total = keras.ops.{node.op.lower()}("
            'keras.ops.cast(x, "float32"), axis=axis)',
        ),
        node.line,
    )


def _check_optimizers(view: View) -> Iterator[Finding]:
    if not any(v.dtype == "float16" for v in view.model.trainable_variables):
        return
    for outer in view.optimizers:
        for optimizer in unwrapped(outer):
            epsilon = getattr(optimizer, "epsilon", None)
            if epsilon is not None and 0 <= epsilon < _FLOAT16.min_normal:
                yield Finding(
                    SMALL_EPSILON.name,
                    ERROR,
                    "",
                    f"{type(optimizer).__name__} computes with epsilon="
                    f"{epsilon:g} in float16, as its weights are: it divides "
                    "by 0.",
                    'keras.config.set_dtype_policy("mixed_float16")',
                )


def _check_inputs(view: View, trace: ForwardTrace) -> Iterator[Finding]:
    x, _, _ = keras.utils.unpack_x_y_sample_weight(view.batch)
    leaves = [leaf for leaf in keras.tree.flatten(x) if hasattr(leaf, "dtype")]
    if len(leaves) != len(trace.inputs):
        return
    for leaf, node in zip(leaves, trace.inputs, strict=True):
        dtype = tf.dtypes.as_dtype(leaf.dtype)
        if not (dtype.is_floating or dtype.is_integer):
            continue
        largest = _largest(np.asarray(leaf))
        if largest <= _FLOAT16.max or not _becomes_float16(trace.graph, node):
            continue
        factor = (
            2.0 ** -math.ceil(math.log2(largest))
            if math.isfinite(largest)
            else 2.0**-16
        )
        yield Finding(
            INPUT_RANGE.name,
            ERROR,
            "",
            f"The data reach {largest:g} and are cast to float16, which ends "
            "at 65504: they become inf.",
            f'x = keras.layers.Rescaling({factor}, dtype="float32")(x)',
        )


def _largest(array: np.ndarray) -> float:
    magnitudes = np.abs(array.astype(np.float64))
    return float(np.max(magnitudes, initial=0.0, where=~np.isnan(magnitudes)))


def _becomes_float16(graph: Graph, node: Node) -> bool:
    if node.dtype == "float16":
        return True
    return any(
        each.op == "Cast" and each.dtype == "float16"
        for each in graph.downstream(
            [node],
            lambda n: n is node or (n.op in MOVES and n.dtype != "float16"),
        )
    )
