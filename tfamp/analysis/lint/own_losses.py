"""Rules for losses of a model's own `train_step` on several replicas."""

from collections.abc import Iterator

from tfamp.analysis.lint.findings import ERROR, WARNING, Finding, Rule
from tfamp.analysis.lint.graph import Graph, Node
from tfamp.analysis.lint.step import StepTrace
from tfamp.analysis.lint.view import View
from tfamp.scaling.own_loss import LOSS_NAMES

UNDIVIDED_LOSS = Rule(
    "undivided-loss",
    "A train_step on several replicas takes gradients of a mean over its own "
    "rows: they are summed over replicas, and the update is that many times "
    "too large.",
)
UNKNOWN_REDUCTION = Rule(
    "unknown-reduction",
    "A train_step gives value_and_gradients a sum on several replicas, and "
    "does not say so: it is taken for a mean.",
)
RULES = (UNDIVIDED_LOSS, UNKNOWN_REDUCTION)

_SUMS = ("Sum", "L2Loss")
_DIVISIONS = ("DivNoNan", "Mean", "RealDiv")
_SCALINGS = ("Mul", "RealDiv", "DivNoNan")


def check(view: View) -> Iterator[Finding]:
    """Findings about losses that depend on the number of replicas."""
    if view.replicas == 1 or view.step is None:
        return
    for optimizer in view.optimizers:
        for loss in view.step.uses[id(optimizer)].scaled_losses:
            yield from _check_loss(view.step, loss, view.replicas)


def _check_loss(
    step: StepTrace, loss: Node, replicas: int
) -> Iterator[Finding]:
    behind = list(
        step.graph.upstream([loss], lambda node: not node.is_backward)
    )
    reductions = {
        reduction
        for node in behind
        for reduction, name in LOSS_NAMES.items()
        if name in node.name
    }
    if _ends_in_sum(step, loss):
        if None in reductions:
            yield Finding(
                UNKNOWN_REDUCTION.name,
                WARNING,
                "",
                "train_step gives value_and_gradients what looks like a sum "
                "over rows; it is taken for a mean, and the update on "
                f"{replicas} replicas is another than on one.",
                "loss, gradients = tfamp.value_and_gradients(\n"
                '    loss_fn, variables, optimizer, reduction="sum"\n'
                ")",
            )
    elif not reductions and not _is_divided(step, behind, replicas):
        yield Finding(
            UNDIVIDED_LOSS.name,
            ERROR,
            "",
            f"train_step scales a loss that is not divided by {replicas} "
            "replicas: their gradients are summed, and the update is "
            f"{replicas} times that of one.",
            "loss, gradients = tfamp.value_and_gradients(\n"
            "    loss_fn, variables, optimizer\n"
            ")\n"
            "optimizer.apply(gradients, variables)",
        )


def _is_divided(step: StepTrace, behind: list[Node], replicas: int) -> bool:
    """Whether Keras divides by the number of replicas, or the user does."""
    divided = {node.name for node in step.divided}
    if any(node.name in divided for node in behind):
        return True
    factors = (replicas, 1.0 / replicas)
    return any(
        node.op in _SCALINGS
        and any(
            value is not None
            and value.size == 1
            and any(abs(float(value) - each) < 1e-6 for each in factors)
            for value in map(step.graph.constant, step.graph.sources(node))
            if value is None or value.dtype.kind in "fiu"
        )
        for node in behind
    )


def _ends_in_sum(step: StepTrace, loss: Node) -> bool:
    """Whether a sum over what the batch decides is added undivided."""
    graph = step.graph
    divided = {node.name for node in step.divided}
    inputs = {node.name for node in step.inputs}

    def is_passed(node: Node) -> bool:
        return (
            node.op not in (*_SUMS, *_DIVISIONS)
            and node.name not in divided
            and not node.is_backward
        )

    return any(
        node.op in _SUMS and _is_scalar(node) and _depends(graph, node, inputs)
        for node in graph.upstream([loss], is_passed)
    )


def _is_scalar(node: Node) -> bool:
    return bool(node.shapes) and node.shapes[0] == ()


def _depends(graph: Graph, node: Node, names: set[str]) -> bool:
    return any(
        each.name in names for each in graph.upstream([node], lambda _: True)
    )
