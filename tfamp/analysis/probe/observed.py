"""Predicted against observed: one batch in float32, and again in float16."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp.analysis.probe import format_losses, steps
from tfamp.analysis.probe.counter import Kind, Step
from tfamp.analysis.probe.format_losses import Shares
from tfamp.analysis.probe.histogram import Histogram
from tfamp.formats import check_scale
from tfamp.precision.computing import computing_in, layers_in_16_bits

# More steps than a dataset to train on before has batches.
_ALL = 2**31


@dataclasses.dataclass(frozen=True)
class Observation:
    """One tensor in float16, as it was foretold and as it came.

    Observed zeros are those beyond the zeros of float32. float16 rounds in
    every layer before this one too, and dropout draws other numbers in it, so
    that the two are not equal to the last value; and where Keras computes in
    float32 inside, as normalizations do, less is lost than foretold.

    Attributes:
        layer, kind, name: of the tensor, as of a `ProbedTensor`.
        predicted: from the histogram in float32.
        observed: of the values of mixed_float16.
    """

    layer: str
    kind: Kind
    name: str
    predicted: Shares
    observed: Shares


def observe(
    model: keras.Model,
    batch: Any,
    scale: float,
    float32_layers: Sequence[str] = (),
    after: tf.data.Dataset | None = None,
) -> list[Observation]:
    """Runs a batch in float32 and in mixed_float16, from the same weights.

    Afterwards the model is bit for bit as before.

    Args:
        model: compiled. Where some of its layers compute in 16 bits, those
            compute in float16 here, and the others in float32; else all do
            but `float32_layers`.
        batch: a global batch, `(x, y)` or `(x, y, sample_weight)`.
        scale: the loss scale, a power of two.
        float32_layers: paths of layers that stay in float32.
        after: batches to train on in float32 before, since an untrained
            network may send no gradient through some layers.

    Returns:
        The tensors that come in float16, in the order of the step.

    Raises:
        InputError: for a model or batch that cannot be used.
        ValueError: the scale is no power of two.
    """
    check_scale(scale)
    dataset = tf.data.Dataset.from_tensors(batch)
    steps.prepare(model, dataset)
    in_16_bits = layers_in_16_bits(model)
    kept = steps.layers_at(model, float32_layers)
    switched = [
        layer
        for layer in in_16_bits or steps.layers_in_float32(model)
        if not any(layer is each for each in kept)
    ]
    with steps.unchanged(model):
        with (
            computing_in("float32", in_16_bits),
            steps.counting(model, Step()) as count,
        ):
            if after is not None:
                count(after, _ALL)
            with steps.unchanged(model):
                exact = count(dataset, 1)
        with (
            computing_in("float32", in_16_bits),
            computing_in("mixed_float16", switched),
            steps.counting(
                model, Step(loss_scale=scale, applies=False)
            ) as count,
        ):
            rounded = count(dataset, 1)
    float16_layers = {
        tensor.layer
        for tensor, dtype in rounded.dtypes.items()
        if dtype == "float16"
    }
    return [
        Observation(
            *tensor,
            predicted=format_losses.shares(
                exact.histograms[tensor],
                "float16",
                1.0 if tensor.kind == "activation" else scale,
            ),
            observed=_observed(histogram, exact.histograms[tensor]),
        )
        for tensor, histogram in rounded.histograms.items()
        if tensor in exact.histograms
        # Gradients of weights come as float32, cast from float16.
        and (
            rounded.dtypes[tensor] == "float16"
            or (tensor.kind == "gradient" and tensor.layer in float16_layers)
        )
    ]


def _observed(rounded: Histogram, exact: Histogram) -> Shares:
    """The shares of the values that are finite and not zero in float32."""
    of = max(exact.measured, 1)
    held = format_losses.shares(rounded, "float16", 1.0)
    zero = max(rounded.zeros - exact.zeros, 0) / of
    subnormal = held.subnormal * rounded.measured / of
    lost = rounded.infinite + rounded.nan - exact.infinite - exact.nan
    overflow = max(lost, 0) / of
    return Shares(
        zero, subnormal, max(1.0 - zero - subnormal - overflow, 0.0), overflow
    )
