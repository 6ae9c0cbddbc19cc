"""Tuning: the layers that must compute in float32, by measurement.

The sensitivity of a layer is the relative error of the whole gradient where
that layer alone computes in 16 bits. Sensitivities add in squares, so the
layers go back to float32 from the most sensitive on, and the error of the rest
is measured after each, until it is a small share of what a gradient differs
by from batch to batch anyway.
"""

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.analysis.probe import measure as probe_measure
from tfamp.analysis.probe import steps as probe_steps
from tfamp.analysis.probe.advice import ProbedTensor, overflowing_layers
from tfamp.analysis.tune.cost import costs_of, narrow_shares
from tfamp.analysis.tune.gradient import Gradients, gradients_of
from tfamp.analysis.tune.report import PathStep, TuneReport
from tfamp.analysis.tune.switch import Switch
from tfamp.analysis.tune.units import Unit, kept_layers, units_of
from tfamp.errors import InputError
from tfamp.layers.float8 import covered_layers
from tfamp.precision.computing import computing_in
from tfamp.precision.kept_layers import is_kept
from tfamp.precision.layer_paths import walk
from tfamp.precision.policy import (
    FLOAT8,
    compute_dtype_of,
    policy_name,
    precision_of,
    resolve_precision,
)
from tfamp.training import preconditions

PRECISIONS = ("mixed_bfloat16", "mixed_float16", FLOAT8)
_SCALES = tuple(2.0**i for i in range(16, 0, -2))
# Powers of two by which later gradients may exceed what was measured.
_HEADROOM = 2.0


def tune(
    model: keras.Model,
    dataset: tf.data.Dataset,
    *,
    steps: int = 4,
    budget: float = 0.1,
    precision: str = "auto",
    microbatches: int = 1,
) -> TuneReport:
    """Finds which layers of a model need float32 beside others in 16 bits.

    Gradients of training steps are measured under the model's strategy, as
    `tfamp.fit` would compute them, also with a `train_step` of the model's
    own: in float32, with each layer alone in 16 bits, and with all layers but
    those that were put back. One step is traced, in which each layer computes
    in either precision.

    Afterwards the model is bit for bit as before, as after `tfamp.probe`.

    Another precision draws other random numbers, which is no error: layers
    with a `keras.random.SeedGenerator` (dropout, noise) are measured by
    rounding what they take and return. Draws without one count as errors.

    In float8 the layers that `tfamp.float8` covers multiply 8-bit numbers, each
    tensor scaled by its own largest magnitude, and all else is bfloat16.

    Args:
        model: compiled. Layers that are in float32 while others are in 16 bits
            stay so.
        dataset: global batches, as for `tfamp.fit`.
        steps: batches to measure on; at least 2.
        budget: the error that is allowed, as a share of the gradient's noise:
            of how far the gradient of one batch is from the mean of all.
        precision: "mixed_bfloat16", "mixed_float16" or "float8"; "auto" for
            the model's own, or if it is in float32 what `tfamp.recommend` says,
            and where that is float32 as well "mixed_bfloat16".
        microbatches: as of `tfamp.fit`. What 16 bits round is the gradient of
            a piece, so that 2 pieces have the scores of 2 replicas, and not
            quite those of 1.

    Returns:
        The report.

    Raises:
        InputError: for a model or data that cannot be used.
    """
    preconditions.check_counts({"steps": steps}, least=2)
    preconditions.check_counts({"microbatches": microbatches})
    if not 0 < budget < float("inf"):
        raise InputError(f"budget={budget} must be a number above 0.")
    precision = _resolved(precision, model)
    probe_steps.prepare(model, dataset)
    preconditions.check_own_step(model, microbatches)
    if microbatches > 1:
        preconditions.check_batches(
            dataset, model.distribute_strategy, microbatches
        )
        preconditions.check_can_accumulate(model)
    began = time.perf_counter()
    if not units_of(model):
        raise InputError(f"Model {model.name!r} has no layer to tune.")
    kept = [each.path for each in kept_layers(model).values() if each.path]
    overflowing: tuple[str, ...] = ()
    if precision == "mixed_float16":
        dataset = _the_same_each_time(dataset, steps)
        tensors, counted = probe_measure.counted_in_float32(
            model, dataset, steps
        )
        overflowing = overflowing_layers(
            _of_16_bits(model, tensors), counted.fed
        )
    policy = policy_name(precision)
    eight_bits = covered_layers(model) if precision == FLOAT8 else []
    whole: list[type] = []
    runs = 0
    while True:
        with _measuring(
            model, dataset, steps, policy, eight_bits, microbatches, whole
        ) as measuring:
            units, reached, gradients = measuring
            limit = budget * gradients.noise
            if gradients.repeat_error > limit / 2:
                raise InputError(
                    "The same step in float32 gives gradients that differ by "
                    f"{gradients.repeat_error:.2g}, more than half of the "
                    f"error of {limit:.2g} that is allowed: a random operation "
                    "without a Keras seed. Give it a "
                    "keras.random.SeedGenerator."
                )
            called = sorted(reached)
            found = _search(
                gradients,
                called,
                _units_of_paths(units, model, overflowing) & set(called),
                limit,
                has_range=compute_dtype_of(precision) == "bfloat16",
                bits="8 bits" if precision == FLOAT8 else "16 bits",
            )
            everything = _layers(units, called)
            tuned = _layers(units, set(called) - set(found.reasons))
            try:
                costs = costs_of(
                    gradients,
                    policy,
                    everything=everything,
                    tuned=tuned,
                    eight_bits=eight_bits,
                    scale=found.scale,
                )
            except Exception:
                # What passes between units behind the switch is float32.
                mixing = _innermost_mixing(units, called, found.reasons, whole)
                if mixing is None:
                    raise
                whole.append(type(mixing.layer))
                continue
            finally:
                runs += gradients.runs
            break
    shares = narrow_shares(
        model, dataset, policy, {"all": everything, "tuned": tuned}
    )
    return TuneReport(
        model=model.name,
        precision=precision,
        steps=gradients.batches,
        budget=budget,
        noise=gradients.noise,
        scores={units[i].path: found.scores[i] for i in called},
        path=tuple(
            PathStep(None if i is None else units[i].path, error)
            for i, error in found.path
        ),
        reasons={units[i].path: why for i, why in found.reasons.items()},
        loss_scale=found.scale,
        costs=costs,
        narrow_shares=shares,
        unseen_layers=tuple(
            unit.path for i, unit in enumerate(units) if i not in called
        ),
        policy_paths={unit.path: tuple(unit.policy_paths) for unit in units},
        pathless={unit.path: unit.pathless for unit in units},
        kept_paths=tuple(dict.fromkeys(kept)),
        runs=runs,
        seconds=time.perf_counter() - began,
    )


@contextlib.contextmanager
def _measuring(
    model: keras.Model,
    dataset: tf.data.Dataset,
    steps: int,
    policy: str,
    eight_bits: Sequence[keras.layers.Layer],
    microbatches: int,
    whole: list[type],
) -> Iterator[tuple[list[Unit], set[int], Gradients]]:
    """Within it: units, those that a step called, and their gradients.

    Classes of layers that cannot take two precisions are added to `whole`.
    """
    while True:
        units = units_of(model, whole)
        switch = Switch(units, keras.dtype_policies.get(policy), eight_bits)
        with contextlib.ExitStack() as stack:
            stack.enter_context(probe_steps.unchanged(model))
            layers = keras_internals.all_layers(model)
            stack.enter_context(computing_in("float32", layers))
            try:
                gradients = stack.enter_context(
                    gradients_of(
                        model,
                        dataset,
                        steps,
                        switch,
                        len(units),
                        microbatches,
                    )
                )
            except Exception:
                failed = switch.failed
                if failed is None or type(failed.layer) in whole:
                    raise
                whole.append(type(failed.layer))
                continue
            yield units, switch.called, gradients
            return


def _the_same_each_time(
    dataset: tf.data.Dataset, steps: int
) -> tf.data.Dataset:
    """The first batches, which a shuffled dataset does not repeat."""
    batches = dataset.take(steps).cache()
    # A cache that is not read to its end is none.
    for _ in batches:
        pass
    return batches


@dataclasses.dataclass
class _Found:
    """What the search came to; units by index, None for none.

    Attributes:
        scores: of each unit alone.
        path: what was put back, and the error of the rest, in order.
        reasons: why, of each that was put back.
        scale: the loss scale that all was measured at.
    """

    scores: dict[int, float]
    path: list[tuple[int | None, float]]
    reasons: dict[int, str]
    scale: float


def _search(
    gradients: Gradients,
    called: Sequence[int],
    overflowing: Collection[int],
    limit: float,
    has_range: bool,
    bits: str,
) -> _Found:
    scores, scale = {i: gradients.error([i]) for i in called}, 1.0
    if not has_range:
        # No scale helps where a layer alone leaves the range without one.
        sound = [i for i in called if np.isfinite(scores[i])]
        scale = next(
            (s for s in _SCALES if np.isfinite(gradients.error(sound, s))),
            _HEADROOM,
        )
        scale /= _HEADROOM
        scores |= {i: gradients.error([i], scale) for i in sound}
    reasons: dict[int, str] = {}
    order = sorted(called, key=lambda i: (i in overflowing, scores[i]))
    error = gradients.error(called, scale)
    path: list[tuple[int | None, float]] = [(None, error)]
    while order and (error > limit or order[-1] in overflowing):
        i = order.pop()
        if i in overflowing:
            reasons[i] = "its output, or what it takes, is beyond the range"
        elif not np.isfinite(scores[i]):
            reasons[i] = f"the gradient is not finite where it is in {bits}"
        else:
            reasons[i] = (
                f"alone in {bits} it moves the gradient by {scores[i]:.2g}"
            )
        error = gradients.error(order, scale)
        path.append((i, error))
    return _Found(scores, path, reasons, scale)


def _layers(
    units: Sequence[Unit], chosen: Iterable[int]
) -> list[keras.layers.Layer]:
    return [layer for i in chosen for layer in units[i].layers]


def _innermost_mixing(
    units: Sequence[Unit],
    called: Collection[int],
    put_back: Collection[int],
    whole: Collection[type],
) -> Unit | None:
    """The smallest unit that is in another precision than some in it."""

    def is_mixing(i: int) -> bool:
        inside = {id(layer) for layer in units[i].inside}
        return any(
            id(units[j].layer) in inside and (i in put_back) != (j in put_back)
            for j in called
        )

    found = [
        units[i]
        for i in called
        if type(units[i].layer) not in whole and is_mixing(i)
    ]
    return min(found, key=lambda unit: len(unit.inside), default=None)


def _of_16_bits(
    model: keras.Model, tensors: Sequence[ProbedTensor]
) -> list[ProbedTensor]:
    """Without those of layers that `tfamp.keep_float32` kept.

    What leaves the range there does so in float32, and where it does not the
    gradient shows it.
    """
    kept = {place.path for place in walk(model) if is_kept(place.layer)}
    return [tensor for tensor in tensors if tensor.layer not in kept]


def _units_of_paths(units: Sequence[Unit], model, paths) -> set[int]:
    """The units that hold the layers at these paths."""
    layers = {id(p.layer) for p in walk(model) if p.path in paths}
    return {
        i
        for i, unit in enumerate(units)
        if any(id(layer) in layers for layer in unit.layers)
    }


def default_precision() -> str:
    """What `tfamp.recommend` says; bfloat16 where that is float32."""
    recommended = resolve_precision("auto")
    return PRECISIONS[0] if recommended == "float32" else recommended


def _resolved(precision: str, model: keras.Model) -> str:
    own = precision_of(model)
    if precision == "auto":
        precision = default_precision() if own == "float32" else own
    if precision not in PRECISIONS:
        raise InputError(
            f"precision={precision!r} cannot be tuned; expected one of "
            f"{', '.join(PRECISIONS)}."
        )
    if own == FLOAT8 != precision:
        raise InputError(
            f"Model {model.name!r} multiplies 8-bit numbers, and cannot be "
            f"tuned for {precision!r}; use precision='float8', or a model "
            "without tfamp.float8."
        )
    return resolve_precision(precision)
