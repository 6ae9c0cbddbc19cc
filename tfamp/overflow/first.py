"""What a replay of a step measures, and what in it is the first overflow."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """A tensor that is looked at.

    name: of the data, the path of a weight, "input" or "output" of a layer.
    layer: path of the layer, or None.
    dtype: of the tensor.
    """

    name: str
    layer: str | None = None
    dtype: str = "float32"


class Table(NamedTuple):
    """The sizes of some tensors on all replicas.

    points: N of them.
    sizes: float64 [replicas, N], the largest magnitude; not finite where any
        element is not; -inf of an empty tensor.
    """

    points: Sequence[Point]
    sizes: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """bool [replicas, N]."""
        return np.isfinite(self.sizes) | np.isneginf(self.sizes)


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one replay of the step measured.

    Attributes:
        data: inputs, targets, sample weights.
        weights: all variables of the model.
        forward: what went into and came out of layers, in execution order.
        losses: what was scaled.
        backward: at the points of `forward`, the gradients that came back.
        gradients: of weights, on each replica.
        sums: of weights, summed over replicas; the same on all of them.
        rows: int64 [replicas, data], the first row of the global batch that
            is not finite; -1 where that has no meaning.
    """

    data: Table
    weights: Table
    forward: Table
    losses: Table
    backward: Table
    gradients: Table
    sums: Table
    rows: np.ndarray


class Culprit(NamedTuple):
    """The first tensor that was not finite, and where.

    stage: the attribute of `Pass`.
    position: which of the stage's points.
    point: the same, by name.
    replicas: those on which it was not finite.
    """

    stage: str
    position: int
    point: Point
    replicas: list[int]


def first_culprit(seen: Pass) -> Culprit | None:
    """The first tensor that is not finite, in execution order.

    Data and weights are there first; outputs count from the first layer to
    the last, gradients from the last to the first.
    """
    for stage in ("data", "weights", "forward", "losses"):
        table = getattr(seen, stage)
        for index in range(len(table.points)):
            if culprit := _culprit(stage, index, table):
                return culprit
    for stage, index in _backward_order(seen):
        if culprit := _culprit(stage, index, getattr(seen, stage)):
            return culprit
    for index in range(len(seen.sums.points)):
        if culprit := _culprit("sums", index, seen.sums):
            return culprit
    return None


def _culprit(stage: str, index: int, table: Table) -> Culprit | None:
    replicas = np.flatnonzero(~table.finite[:, index]).tolist()
    if not replicas:
        return None
    return Culprit(stage, index, table.points[index], replicas)


def _backward_order(seen: Pass) -> list[tuple[str, int]]:
    """Points of gradients as the backward pass comes by.

    A layer gets the gradient of its output, and makes of it those of its
    weights and of its inputs.
    """
    points = seen.backward.points
    last = len(points) - 1
    ranked: list[tuple[float, str, int]] = [
        (last - i, "backward", i) for i in range(len(points))
    ]
    for index, gradient in enumerate(seen.gradients.points):
        inputs, outputs = (
            [
                last - i
                for i, point in enumerate(points)
                if (point.layer, point.name) == (gradient.layer, side)
            ]
            for side in ("input", "output")
        )
        # A layer that takes integers has no inputs that count.
        after, before = max(outputs, default=last), min(inputs, default=None)
        rank = after + 0.5 if before is None else before - 0.5
        ranked.append((rank, "gradients", index))
    return [(stage, index) for _, stage, index in sorted(ranked)]
