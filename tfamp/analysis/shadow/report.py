"""What the shadow says: operations, worst first, each with its fix."""

import dataclasses

from tfamp.analysis.lint.findings import ERROR, WARNING, Finding, Rule
from tfamp.analysis.shadow.differences import (
    DISCRETE,
    INFINITE,
    NAN,
    ZERO,
    Difference,
)

MADE_ERROR = Rule(
    "made-error",
    "An operation that was run beside itself in float32 makes more error than "
    "the rounding of 16 bits.",
)


@dataclasses.dataclass(frozen=True)
class MadeError:
    """An operation that made more error than the rounding of 16 bits.

    Attributes:
        operation: its TensorFlow type.
        layer: the path of the layer that it runs in, "" for none.
        line: "file.py:12", where the code stands that runs it; "" where that
            is nobody's own.
        dtype: what it computes in.
        is_backward: whether it belongs to a gradient.
        own: what it makes of inputs that are right.
        total: what it gave on, with what it inherited; None where nothing.
        replicas: on which of them, from 0.
        fix: code to paste.
    """

    operation: str
    layer: str
    line: str
    dtype: str
    is_backward: bool
    own: Difference
    total: Difference | None
    replicas: tuple[int, ...]
    fix: str

    def __str__(self) -> str:
        where = f"layer {self.layer}" if self.layer else "the model's own code"
        of = "the gradient of " if self.is_backward else ""
        at = f", {self.line}" if self.line else ""
        return (
            f"{self.operation} in {self.dtype}, {of}{where}{at}:"
            f" {_words(self.own)}"
        )


@dataclasses.dataclass(frozen=True)
class CompareReport:
    """A training step in the model's precision beside float32.

    Attributes:
        model: its name.
        errors: where error is made beyond rounding, worst first.
        operations: how many were compared.
        replicas: on how many.
        loss: by how much the loss differs in all; None where it does not.
        gradients: by how much the worst gradient does.
    """

    model: str
    errors: tuple[MadeError, ...]
    operations: int
    replicas: int
    loss: Difference | None
    gradients: Difference | None

    def findings(self) -> list[Finding]:
        """The same as lint says it."""
        return [
            Finding(
                MADE_ERROR.name,
                ERROR
                if each.own.kind in (NAN, INFINITE, DISCRETE)
                else WARNING,
                each.layer,
                f"{each}.",
                each.fix,
            )
            for each in self.errors
        ]

    @property
    def worst(self) -> MadeError | None:
        """Where most error is made; None where none is."""
        return self.errors[0] if self.errors else None

    def __str__(self) -> str:
        lines = [
            f"{self.operations} operations of model {self.model} in 16 bits"
            f" beside float32: {len(self.errors)} make more than rounding."
        ]
        for each in self.errors:
            lines += [str(each), *(f"    {x}" for x in each.fix.splitlines())]
        return "\n".join(lines)


def _words(own: Difference) -> str:
    if own.kind in (NAN, INFINITE):
        return (
            f"{own.size:.2%} of its result is {own.kind}, and finite in float32"
        )
    if own.kind == DISCRETE:
        return f"{own.size:.2%} of its result is another than in float32"
    if own.kind == ZERO:
        return (
            f"what is not zero in float32 becomes zero, {own.size:.1%} of its"
            " result"
        )
    return f"{own.size:.1%} off"
