"""Rules for losses and metrics."""

from collections.abc import Iterator

import keras

from tfamp.analysis.lint.findings import (
    DTYPES_16,
    ERROR,
    WARNING,
    Finding,
    Rule,
)
from tfamp.analysis.lint.graph import Graph, Node
from tfamp.analysis.lint.ops import ARITHMETIC, MOVES
from tfamp.analysis.lint.trace import LOSS, METRICS, ForwardTrace
from tfamp.analysis.lint.view import View, compiled_with, is_16_bit

ROUNDED_LOSS = Rule(
    "rounded-loss",
    "A loss, or one given to add_loss, is computed in 16 bits: it is rounded, "
    "and in float16 it overflows as soon as it is scaled.",
)
ROUNDED_METRIC = Rule(
    "rounded-metric",
    "A metric accumulates in 16 bits: after some batches it stands still.",
)
RULES = (ROUNDED_LOSS, ROUNDED_METRIC)

# What a loss is computed with; moving and comparing numbers is not.
_COMPUTING = ARITHMETIC | {
    "Abs",
    "Exp",
    "Log",
    "Log1p",
    "LogSoftmax",
    "Mean",
    "Pow",
    "Sigmoid",
    "Softmax",
    "SoftmaxCrossEntropyWithLogits",
    "Softplus",
    "SparseSoftmaxCrossEntropyWithLogits",
    "Sqrt",
    "Square",
    "SquaredDifference",
    "Sum",
}
_SUMS = ("Mean", "Sum")


def check(view: View) -> Iterator[Finding]:
    """Findings about losses and metrics."""
    found = [
        _loss_finding(
            "",
            f"Loss {loss.name!r} is computed in {loss.dtype}.",
            f"loss = {_in_float32(loss)}",
        )
        for loss in compiled_with(view.model, "loss")
        if getattr(loss, "dtype", None) in DTYPES_16
    ]
    yield from found
    for trace in view.passes:
        # Those that are found by their dtype are found in the graph once more.
        if not found:
            yield from _check_traced_loss(trace)
        yield from _check_added_losses(trace)
    yield from _check_step(view)
    yield from _check_metrics(view)


def _in_float32(of: keras.losses.Loss | keras.metrics.Metric) -> str:
    """The call that makes a loss or a metric in float32."""
    module, name = type(of).__module__, type(of).__name__
    if module.partition(".")[0] == "keras":
        kind = "losses" if isinstance(of, keras.losses.Loss) else "metrics"
        name = f"keras.{kind}.{name}"
    return f'{name}(dtype="float32")'


def _check_traced_loss(trace: ForwardTrace) -> Iterator[Finding]:
    if trace.loss is None:
        return
    nodes = [n for n in trace.graph.forward() if n.place == LOSS]
    rounded = [n for n in nodes if n.op in _COMPUTING and is_16_bit(n)]
    if is_16_bit(trace.loss):
        rounded.append(trace.loss)
    for node in rounded[:1]:
        yield _loss_finding(
            "",
            f"The loss is computed in {node.dtype} ({node.op}).",
            'y_pred = keras.ops.cast(y_pred, "float32")',
        )


def _check_added_losses(trace: ForwardTrace) -> Iterator[Finding]:
    for added in trace.added_losses:
        node = _rounded_behind(trace.graph, added.node)
        dtype = added.dtype if added.dtype in DTYPES_16 else node and node.dtype
        if dtype:
            yield _loss_finding(
                added.layer,
                f"The loss given to add_loss is computed in {dtype}.",
                'x = keras.ops.cast(x, "float32")',
            )


def _rounded_behind(graph: Graph, node: Node) -> Node | None:
    """The 16-bit sum whose result is only scaled and moved afterwards."""
    for each in graph.upstream([node], lambda n: n.op in (*MOVES, "Mul")):
        if each.op in _SUMS and is_16_bit(each):
            return each
    return None


def _check_step(view: View) -> Iterator[Finding]:
    if view.step is None:
        return
    for use in view.step.uses.values():
        for dtype in use.loss_dtypes:
            if dtype in DTYPES_16:
                yield _loss_finding(
                    "",
                    f"train_step scales a loss of {dtype}.",
                    'loss = keras.ops.cast(loss, "float32")',
                )


def _loss_finding(layer: str, what: str, fix: str) -> Finding:
    return Finding(
        ROUNDED_LOSS.name,
        ERROR,
        layer,
        f"{what} It is rounded, and times the loss scale it overflows.",
        fix,
    )


def _check_metrics(view: View) -> Iterator[Finding]:
    given = compiled_with(view.model, "metrics", "weighted_metrics")
    metrics = {
        id(each): each
        for each in (*given, *view.model.metrics)
        if isinstance(each, keras.metrics.Metric)
    }
    found = []
    for metric in metrics.values():
        dtypes = {metric.dtype, *(v.dtype for v in metric.variables)}
        for dtype in sorted(dtypes & set(DTYPES_16)):
            found.append(
                _metric_finding(
                    f"Metric {metric.name!r}",
                    dtype,
                    f"metric = {_in_float32(metric)}",
                )
            )
    yield from found
    # Those that are found by their dtype are found in the graph once more.
    sums = (
        node
        for trace in view.passes
        for node in trace.graph.forward()
        if node.place == METRICS and node.op in _SUMS and is_16_bit(node)
    )
    for node in () if found else sums:
        yield _metric_finding(
            "A metric",
            node.dtype,
            'y_pred = keras.ops.cast(y_pred, "float32")',
        )


def _metric_finding(name: str, dtype: str, fix: str) -> Finding:
    counted = 2048 if dtype == "float16" else 256
    return Finding(
        ROUNDED_METRIC.name,
        WARNING,
        "",
        f"{name} accumulates in {dtype}, which counts by ones up to {counted} "
        "only.",
        fix,
    )
