"""From histograms to advice: a precision, a loss scale, layers for float32.

The rule, in the order in which it is applied to the tensors of all layers that
are not in float32 already:

1.  A layer whose output, times the headroom, overflows float16 belongs in
    float32, and with it the layers that take this output, for they would round
    it to float16: the loss scale does not move outputs.
2.  A scale is possible where no gradient, of a weight or arriving at an
    output, overflows float16, times the headroom: one overflow costs the step.
3.  Of the possible scales the best is the one that loses least: the share of
    values flushed to zero, and a tenth of those kept as subnormals, which keep
    1 to 10 of 11 bits. It is the mean over tensors: each counts alike, however
    large. Of several scales that lose the same the middle one is taken.
4.  A layer of whose weight gradient too much is still flushed belongs in
    float32.
5.  float16 serves if no more than a hundredth is flushed over all, and no more
    than a tenth of any tensor. Else bfloat16, if it serves; else float32.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tfamp.analysis.probe import format_losses
from tfamp.analysis.probe.counter import Kind
from tfamp.analysis.probe.format_losses import SCALES, Shares
from tfamp.analysis.probe.histogram import Histogram

# Powers of two by which later steps may exceed what was measured.
HEADROOM = 2
SUBNORMAL_WEIGHT = 0.1
MAX_FLUSHED = 0.01
MAX_FLUSHED_OF_TENSOR = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class ProbedTensor:
    """A tensor of the model, as it was over all probed steps.

    Attributes:
        layer: the layer's path, as `tfamp.keep_float32` takes it.
        kind: "activation" (the layer's output), "activation_gradient" (what
            arrives there) or "gradient" (of a weight). Gradients are the true
            ones: not scaled.
        name: of the weight; of an output its number, where there are several.
        histogram: of its values.
        is_float32: whether the layer computes in float32 though others of the
            model compute in 16 bits, so that no format cuts this tensor.
    """

    layer: str
    kind: Kind
    name: str
    histogram: Histogram
    is_float32: bool

    @property
    def is_scaled(self) -> bool:
        """Whether the loss scale moves it."""
        return self.kind != "activation"

    @property
    def label(self) -> str:
        """Such as `dense/kernel, gradient`."""
        path = f"{self.layer}/{self.name}" if self.name else self.layer
        return f"{path}, {self.kind.replace('_', ' ')}"

    def losses(self, format_name: str, scale: float = 1.0) -> Shares:
        """What a format makes of the values, multiplied by a scale."""
        return format_losses.shares(self.histogram, format_name, scale)


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        precision: "mixed_float16", "mixed_bfloat16" or "float32".
        scale: the loss scale for that precision; 1 where it needs none.
        float32_layers: paths of the layers to keep in float32.
        reason: why, in words.
        float16_scale: the scale at which float16 loses least, whether or not
            that is little enough; None where it overflows at every scale.
    """

    precision: str
    scale: float
    float32_layers: tuple[str, ...]
    reason: str
    float16_scale: float | None


def advise(
    tensors: Sequence[ProbedTensor],
    fed: Mapping[str, Collection[str]] | None = None,
) -> Advice:
    """Applies the rule of this module to what was measured.

    Args:
        tensors: that were measured, in the order of the step.
        fed: by layer, the layers that take what it returns.
    """
    broken = [t for t in tensors if t.is_scaled and _is_not_finite(t)]
    if broken:
        return Advice(
            "float32",
            1.0,
            (),
            f"{broken[0].label} is not finite in float32 already: no precision "
            "mends that.",
            None,
        )
    in_16_bits = [t for t in tensors if not t.is_float32]
    large = overflowing_layers(tensors, fed or {})
    gradients = [t for t in in_16_bits if t.is_scaled and t.layer not in large]
    costs = scale_costs(gradients)
    if np.isinf(costs).all():
        return _without_float16(
            tensors,
            f"float16 cannot hold {_largest(gradients).label} at any scale.",
            None,
        )
    best = np.flatnonzero(np.isclose(costs, costs.min(), rtol=0, atol=1e-9))
    position = best[len(best) // 2]
    scale = SCALES[position]
    flushed = {t: t.losses("float16", scale).zero for t in gradients}
    lossy = _layers(
        t
        for t in gradients
        if t.kind == "gradient" and flushed[t] > MAX_FLUSHED_OF_TENSOR
    )
    left = [t for t in gradients if t.layer not in lossy]
    mean = float(np.mean([flushed[t] for t in left] or [0.0]))
    worst = max(left, key=flushed.__getitem__, default=None)
    if worst is not None and (
        mean > MAX_FLUSHED or flushed[worst] > MAX_FLUSHED_OF_TENSOR
    ):
        return _without_float16(
            tensors,
            f"At its best scale, {scale:g}, float16 flushes {mean:.1%} of the "
            f"gradients to zero, and {flushed[worst]:.1%} of {worst.label}.",
            scale,
        )
    reason = (
        f"At loss scale {scale:g} float16 flushes {mean:.2%} of the gradients "
        f"to zero, {_mean_flushed(left, 1.0):.2%} without scaling"
    )
    if position + 1 < len(SCALES) and np.isinf(costs[position + 1]):
        limit = _largest(gradients)
        reason += f"; {limit.label} leaves no headroom for more"
    return Advice("mixed_float16", scale, (*large, *lossy), reason + ".", scale)


def overflowing_layers(
    tensors: Sequence[ProbedTensor], fed: Mapping[str, Collection[str]]
) -> tuple[str, ...]:
    """The first rule: what no loss scale keeps within float16.

    Args:
        tensors: that were measured, in the order of the step.
        fed: by layer, the layers that take what it returns.
    """
    in_16_bits = [t for t in tensors if not t.is_float32]
    return _with_takers(
        _layers(t for t in in_16_bits if _output_overflows(t, "float16")),
        _layers(in_16_bits),
        fed,
    )


def scale_costs(gradients: Sequence[ProbedTensor]) -> np.ndarray:
    """float64 [25]: what float16 loses at each of `SCALES`; inf: a step."""
    costs = np.zeros(len(SCALES))
    for tensor in gradients:
        shares = format_losses.shares_by_scale(tensor.histogram, "float16")
        lost = shares[:, 0] + SUBNORMAL_WEIGHT * shares[:, 1]
        costs += lost / len(gradients)
        costs[
            format_losses.overflows(tensor.histogram, "float16", HEADROOM)
        ] = np.inf
    return costs


def _without_float16(
    tensors: Sequence[ProbedTensor], reason: str, float16_scale: float | None
) -> Advice:
    for tensor in tensors:
        shares = tensor.losses("bfloat16")
        if shares.overflow or shares.zero > MAX_FLUSHED_OF_TENSOR:
            return Advice(
                "float32",
                1.0,
                (),
                f"{reason} bfloat16 loses {shares.zero + shares.overflow:.1%} "
                f"of {tensor.label}.",
                float16_scale,
            )
    reason = f"{reason} bfloat16 holds them all, and needs no loss scaling."
    return Advice("mixed_bfloat16", 1.0, (), reason, float16_scale)


def _is_not_finite(tensor: ProbedTensor) -> bool:
    return bool(tensor.histogram.infinite or tensor.histogram.nan)


def _output_overflows(tensor: ProbedTensor, format_name: str) -> bool:
    if tensor.is_scaled:
        return False
    return bool(
        format_losses.overflows(tensor.histogram, format_name, HEADROOM)[0]
    )


def _layers(tensors) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tensor.layer for tensor in tensors))


def _with_takers(layers, all_layers, fed) -> tuple[str, ...]:
    """The layers and those that they feed, in the order of the model."""
    wanted = {*layers, *(taker for one in layers for taker in fed.get(one, ()))}
    return tuple(layer for layer in all_layers if layer in wanted)


def _largest(tensors: Sequence[ProbedTensor]) -> ProbedTensor:
    """The one with the largest value, to a power of two."""
    return max(
        tensors,
        key=lambda t: max(np.flatnonzero(t.histogram.by_exponent), default=-1),
    )


def _mean_flushed(tensors: Sequence[ProbedTensor], scale: float) -> float:
    shares = [t.losses("float16", scale).zero for t in tensors]
    return float(np.mean(shares or [0.0]))
