"""Rules for what a model returns."""

from collections.abc import Iterator

from tfamp import keras_internals
from tfamp.analysis.lint.findings import ERROR, WARNING, Finding, Rule
from tfamp.analysis.lint.graph import Graph, Node
from tfamp.analysis.lint.ops import ARITHMETIC, MOVES
from tfamp.analysis.lint.trace import LOSS, METRICS, ForwardTrace
from tfamp.analysis.lint.view import View, is_16_bit
from tfamp.formats import FORMATS

SENSITIVE_OUTPUT = Rule(
    "sensitive-output",
    "A softmax, sigmoid, logarithm or exponential in 16 bits makes an output: "
    "where it saturates, its gradient is exactly 0.",
)
ROUNDED_OUTPUT = Rule(
    "rounded-output",
    "An output has 16 bits: the loss sees it rounded.",
)
RULES = (SENSITIVE_OUTPUT, ROUNDED_OUTPUT)

SENSITIVE = ("Exp", "Log", "Log1p", "LogSoftmax", "Sigmoid", "Softmax")

KEEP = "tfamp.keep_float32(model)"

_BY_CODE = {
    "Exp": "keras.ops.exp",
    "Log": "keras.ops.log",
    "Log1p": "keras.ops.log1p",
    "LogSoftmax": "keras.ops.log_softmax",
    "Sigmoid": "keras.ops.sigmoid",
    "Softmax": "keras.ops.softmax",
}


def check(view: View) -> Iterator[Finding]:
    """Findings about outputs."""
    for trace in view.passes:
        yield from _check_outputs(view, trace)


def sensitive_output_nodes(trace: ForwardTrace) -> Iterator[Node]:
    """The 16-bit softmaxes and the like that make the outputs."""
    for output in trace.outputs:
        behind = trace.graph.upstream(
            [output], lambda node: _hands_on(trace.graph, node)
        )
        for node in behind:
            if node.op in SENSITIVE and is_16_bit(node):
                yield node


def in_float32(view: View, node: Node, code: str) -> str:
    """The fix for an operation inside the model: `keep_float32`, if it helps.

    Args:
        view: of the model.
        node: the operation.
        code: what to write instead, where the model was kept already, or a
            training step computes it.
    """
    is_kept = keras_internals.is_marked(view.model, "tfamp_keep_float32")
    if is_kept or node.place in (LOSS, METRICS):
        return code
    is_in_step = view.step is not None and (
        view.step.graph.nodes.get(node.name) is node
    )
    return code if is_in_step and not node.place else KEEP


def output_in_float32(view: View, node: Node, code: str) -> str:
    """The fix for an output, which `keep_float32` reaches in layers only."""
    is_in_own_call = view.layer_at(node.place) is view.model and not hasattr(
        view.model, "operations"
    )
    return code if is_in_own_call else in_float32(view, node, code)


def op_in_float32(op: str, variable: str) -> str:
    """Code that computes an operation in float32."""
    return f'{_BY_CODE[op]}(keras.ops.cast({variable}, "float32"))'


def _check_outputs(view: View, trace: ForwardTrace) -> Iterator[Finding]:
    sensitive = list(sensitive_output_nodes(trace))
    for node in sensitive:
        yield Finding(
            SENSITIVE_OUTPUT.name,
            ERROR,
            node.place,
            f"{_plain(node.op)} in {node.dtype} makes an output: where it "
            "saturates, its gradient is exactly 0.",
            output_in_float32(
                view, node, f"outputs = {op_in_float32(node.op, 'x')}"
            ),
            node.line,
        )
    # Features for another model may be of any dtype; a loss reads these.
    if sensitive or not view.model.compiled:
        return
    for output in trace.outputs:
        if is_16_bit(output):
            yield Finding(
                ROUNDED_OUTPUT.name,
                WARNING,
                output.place,
                f"An output is {output.dtype}: the loss sees it rounded to "
                f"{_digits(output.dtype)} bits.",
                output_in_float32(
                    view,
                    output,
                    'outputs = keras.ops.cast(outputs, "float32")',
                ),
                output.line,
            )


def _hands_on(graph: Graph, node: Node) -> bool:
    if node.op in MOVES:
        return True
    # Clipped, shifted or scaled by a constant it is still what it was.
    sources = graph.sources(node)
    variable = [each for each in sources if graph.constant(each) is None]
    return node.op in ARITHMETIC and len(variable) == 1


def _plain(op: str) -> str:
    return {
        "Exp": "An exponential",
        "Log": "A logarithm",
        "Log1p": "A logarithm",
        "LogSoftmax": "A log-softmax",
        "Sigmoid": "A sigmoid",
        "Softmax": "A softmax",
    }[op]


def _digits(dtype: str) -> int:
    return FORMATS[dtype].mantissa_bits + 1
