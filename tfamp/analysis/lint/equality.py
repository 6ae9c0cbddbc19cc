"""The rule for numbers that are asked for exactly, once they are rounded."""

from collections.abc import Iterator

import numpy as np

from tfamp.analysis.lint.findings import ERROR, Finding, Rule
from tfamp.analysis.lint.graph import Graph, Node
from tfamp.analysis.lint.ops import MOVES
from tfamp.analysis.lint.outputs import in_float32
from tfamp.analysis.lint.trace import LOSS, METRICS
from tfamp.analysis.lint.view import View, is_16_bit, shown
from tfamp.formats import FORMATS

ROUNDED_EQUALITY = Rule(
    "rounded-equality",
    "Numbers that 16 bits have rounded are compared for equality, or taken "
    "for ids: the next ones are the same number there.",
)
RULES = (ROUNDED_EQUALITY,)

_COMPARISONS = ("Equal", "NotEqual")
# Whatever they find is one of the numbers themselves.
_CHOOSING = ("Max", "Min", "Maximum", "Minimum")


def check(view: View) -> Iterator[Finding]:
    """Findings about equality and ids."""
    for graph in view.graphs():
        for node in graph.forward():
            if node.place in (LOSS, METRICS):
                continue
            if node.op in _COMPARISONS:
                rounded = _compared(graph, node)
                what = "compared for equality"
            elif node.op == "Cast" and "int" in node.dtype:
                rounded = _taken_for_ids(graph, node)
                what = "taken for ids"
            else:
                continue
            if rounded is not None:
                yield _finding(view, node, rounded, what)


def _compared(graph: Graph, node: Node) -> Node | None:
    """The rounded number that is compared, but with 0 or its own extreme."""
    sources = graph.sources(node)
    for source in sources:
        value = graph.constant(source)
        if value is not None and not np.any(value):
            return None
        if any(each.op in _CHOOSING for each in _moved(graph, source)):
            return None
    return next(
        (found for s in sources if (found := _rounded(graph, s)) is not None),
        None,
    )


def _taken_for_ids(graph: Graph, node: Node) -> Node | None:
    """The rounded data that an integer is made of."""
    sources = graph.sources(node)
    if not sources or not any(
        each.op == "Placeholder" for each in _moved(graph, sources[0])
    ):
        return None
    return _rounded(graph, sources[0])


def _rounded(graph: Graph, node: Node) -> Node | None:
    if graph.constant(node) is not None:
        return None
    return next((n for n in _moved(graph, node) if is_16_bit(n)), None)


def _moved(graph: Graph, node: Node) -> Iterator[Node]:
    return graph.upstream([node], lambda each: each.op in MOVES)


def _finding(view: View, node: Node, rounded: Node, what: str) -> Finding:
    first = 2 ** (FORMATS[rounded.dtype].mantissa_bits + 1)
    return Finding(
        ROUNDED_EQUALITY.name,
        ERROR,
        shown(node.place),
        f"Numbers rounded to {rounded.dtype} are {what}: {first + 1} is "
        f"{first} there.",
        in_float32(
            view,
            node,
            "# before the numbers are rounded: int32, or a layer with\n"
            'dtype="float32", autocast=False',
        ),
        node.line,
    )
