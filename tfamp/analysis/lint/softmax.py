"""Rules for softmaxes inside a model, and the masks before them."""

from collections.abc import Iterator

import numpy as np

from tfamp.analysis.lint.findings import ERROR, WARNING, Finding, Rule
from tfamp.analysis.lint.graph import Graph, Node
from tfamp.analysis.lint.ops import MOVES, PRODUCTS
from tfamp.analysis.lint.outputs import (
    in_float32,
    op_in_float32,
    sensitive_output_nodes,
)
from tfamp.analysis.lint.trace import LOSS
from tfamp.analysis.lint.view import View, is_16_bit, shown
from tfamp.formats import FORMATS

ATTENTION_SOFTMAX = Rule(
    "attention-softmax",
    "The softmax of an attention is in 16 bits: float16 logits overflow at "
    "65504, and small weights become 0.",
)
HIDDEN_SOFTMAX = Rule(
    "hidden-softmax",
    "A softmax inside the model is in 16 bits: where it saturates, its "
    "gradient is exactly 0.",
)
MASK_CONSTANT = Rule(
    "mask-constant",
    "A constant such as -1e9 lies beyond float16's range and is -inf there: "
    "times 0 it is NaN, and so is the softmax of a row of it.",
)
RULES = (ATTENTION_SOFTMAX, HIDDEN_SOFTMAX, MASK_CONSTANT)

_MAX = FORMATS["float16"].max
_SOFTMAXES = ("LogSoftmax", "Softmax")
# From the softmax to the product with the values: dropout, and moves.
_UP_TO_PRODUCT = MOVES | {"Mul", "RealDiv"}
# A softmax over several axes is written as an exponential and its sum.
_ATTENDING = (*_SOFTMAXES, "Exp")
_FLOAT_MASKING = {"Add", "AddV2", "Mul", "Neg", "Select", "SelectV2", "Sub"}
_KEEPS_VALUES = (_FLOAT_MASKING | MOVES) - {"Cast"}

_MASK_FIX = "scores = keras.ops.where(mask, scores, -3e4)"


def check(view: View) -> Iterator[Finding]:
    """Findings about softmaxes and masks."""
    of_outputs = [
        {node.name for node in sensitive_output_nodes(trace)}
        for trace in view.passes
    ]
    # A training step of one's own has no outputs that lint could tell.
    of_outputs += [set()] * (len(list(view.graphs())) - len(of_outputs))
    for graph, excepted in zip(view.graphs(), of_outputs, strict=True):
        for node in graph.forward():
            if (
                node.op in _ATTENDING
                and is_16_bit(node)
                and node.name not in excepted
                # In a loss it is one reason among others to mend the loss.
                and node.place != LOSS
            ):
                yield from _check_softmax(view, graph, node)
            if node.value is not None:
                yield from _check_constant(graph, node)


def _check_softmax(view, graph: Graph, node: Node) -> Iterator[Finding]:
    fix = in_float32(
        view,
        node,
        f"weights = {op_in_float32('Softmax', 'logits')}\n"
        "weights = keras.ops.cast(weights, logits.dtype)",
    )
    if _weighs_a_product(graph, node):
        is_float16 = node.dtype == "float16"
        yield Finding(
            ATTENTION_SOFTMAX.name,
            ERROR if is_float16 else WARNING,
            shown(node.place),
            f"The attention's softmax is in {node.dtype}: "
            + (
                "logits beyond 65504 become inf and its result NaN."
                if is_float16
                else "its logits and its result are rounded to 8 bits."
            ),
            fix,
            node.line,
        )
    elif node.op in _SOFTMAXES:
        yield Finding(
            HIDDEN_SOFTMAX.name,
            WARNING,
            shown(node.place),
            f"A softmax is in {node.dtype}: where it saturates, its gradient "
            "is exactly 0.",
            fix,
            node.line,
        )


def _weighs_a_product(graph: Graph, node: Node) -> bool:
    """Whether it is multiplied with activations, as no router's is."""
    path = {node.name}
    for each in graph.downstream(
        [node], lambda n: n is node or n.op in _UP_TO_PRODUCT
    ):
        path.add(each.name)
        if each.op in PRODUCTS and not each.is_backward:
            others = [s for s in graph.sources(each) if s.name not in path]
            if not any(_is_weight(graph, other) for other in others):
                return True
    return False


def _is_weight(graph: Graph, node: Node) -> bool:
    behind = graph.upstream([node], lambda n: n.op in MOVES)
    return any(each.op == "ReadVariableOp" for each in behind)


def _check_constant(graph: Graph, node: Node) -> Iterator[Finding]:
    value = node.value
    if value is None:
        return
    if node.dtype == "float16" and np.isinf(value).any():
        ends = {
            each.op
            for each in graph.downstream(
                [node], lambda n: n is node or n.op in MOVES
            )
            if not each.is_backward
        }
        used = ends & _FLOAT_MASKING
        if used:
            yield _mask_finding(node.place, "Mul" in used, f"{_sign(value)}inf")
    elif node.dtype in ("float32", "float64") and _is_beyond(value):
        for each in graph.downstream(
            [node], lambda n: n.op in _KEEPS_VALUES or n is node
        ):
            if (
                each.op == "Cast"
                and each.dtype == "float16"
                and not each.is_backward
            ):
                largest = value.flat[np.abs(value).argmax()]
                yield _mask_finding(each.place, False, f"{largest:g}")
                return


def _mask_finding(place: str, is_factor: bool, value: str) -> Finding:
    return Finding(
        MASK_CONSTANT.name,
        ERROR if is_factor else WARNING,
        shown(place),
        f"A constant beyond float16's range ({value}) is infinite there: "
        + (
            "times 0, where nothing is masked, it is NaN."
            if is_factor
            else "the softmax of a row that is masked as a whole is NaN."
        ),
        _MASK_FIX,
    )


def _is_beyond(value: np.ndarray) -> bool:
    if value.size == 0:
        return False
    largest = float(np.abs(value).max())
    return _MAX < largest < float("inf")


def _sign(value: np.ndarray) -> str:
    return "-" if (value < 0).any() else ""
