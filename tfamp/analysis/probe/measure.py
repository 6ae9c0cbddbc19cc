"""Probing: a few training steps observed, and what they say about precision.

Everything is measured in float32, whatever the model's precision: what 16
bits cut off before it was seen could not be counted.
"""

import keras
import tensorflow as tf
from absl import logging

from tfamp.analysis.probe import steps as probe_steps
from tfamp.analysis.probe.advice import ProbedTensor, advise
from tfamp.analysis.probe.counter import Step, TensorName, tapped_parts
from tfamp.analysis.probe.histogram import Histogram
from tfamp.analysis.probe.report import ProbeReport
from tfamp.precision.computing import computing_in, layers_in_16_bits
from tfamp.training import preconditions

# What hands on weights that are stored in 16 bits.
_HANDING_ON = {"Const", "Placeholder", "ReadVariableOp"}


def probe(
    model: keras.Model, dataset: tf.data.Dataset, *, steps: int = 8
) -> ProbeReport:
    """Measures what 16-bit formats would lose of a model in training.

    Runs training steps in float32 under the model's strategy, as `tfamp.fit`
    would, also with a `train_step` of the model's own, and counts on the
    device, by power of two, the values of each weight gradient, each layer's
    output and the gradient that arrives there. Gradients are counted on each
    replica before they are summed, which is where 16 bits cut them, and
    without the loss scale.

    Afterwards the model is bit for bit as before: weights, optimizer,
    metrics, seeds and precision. Two things stay: what was not built is built,
    and a dataset that shuffles anew at each pass is one pass further.

    Not seen is what a model computes outside of its layers, and inside of
    loops and functions of its own.

    Args:
        model: compiled.
        dataset: global batches, as for `tfamp.fit`; at most `steps` of them
            are taken.
        steps: training steps to measure.

    Returns:
        The report.

    Raises:
        InputError: for a model or data that cannot be used.
    """
    preconditions.check_counts({"steps": steps})
    probe_steps.prepare(model, dataset)
    tensors, counted = counted_in_float32(model, dataset, steps)
    return ProbeReport(
        model=model.name,
        steps=counted.steps,
        tensors=tensors,
        advice=advise(tensors, counted.fed),
        policy_paths=_policy_paths(model, counted.histograms),
        unseen_layers=_unseen(model, counted.histograms),
    )


def counted_in_float32(
    model: keras.Model, dataset: tf.data.Dataset, steps: int
) -> tuple[tuple[ProbedTensor, ...], probe_steps.Counted]:
    """Counts what passes in some steps; the model is as before afterwards.

    Args:
        model: prepared.
        dataset: global batches.
        steps: how many of them, at most.
    """
    in_16_bits = layers_in_16_bits(model)
    in_float32 = {
        part.path
        for part in tapped_parts(model)
        if in_16_bits and part.owner.compute_dtype == "float32"
    }
    with (
        probe_steps.unchanged(model),
        computing_in("float32", in_16_bits),
        probe_steps.counting(model, Step()) as count,
    ):
        counted = count(dataset, steps)
    narrow = set(counted.narrow) - _HANDING_ON
    if narrow:
        logging.warning(
            "probe measures in float32, but the model's own code computes in"
            " 16 bits whatever its policy says (%s); make it follow"
            " self.compute_dtype, or what 16 bits cut off there is not seen.",
            ", ".join(sorted(narrow)),
        )
    tensors = tuple(
        ProbedTensor(*name, histogram, is_float32=name.layer in in_float32)
        for name, histogram in counted.histograms.items()
    )
    return tensors, counted


def _policy_paths(
    model: keras.Model, seen: dict[TensorName, Histogram]
) -> dict[str, str | None]:
    # Weights of no layer are the model's own, under its name.
    paths: dict[str, str | None] = {t.layer: t.layer for t in seen}
    return paths | {part.path: part.owner.path for part in tapped_parts(model)}


def _unseen(
    model: keras.Model, seen: dict[TensorName, Histogram]
) -> tuple[str, ...]:
    layers = {t.layer for t in seen if t.kind == "activation"}
    return tuple(
        part.path for part in tapped_parts(model) if part.path not in layers
    )
