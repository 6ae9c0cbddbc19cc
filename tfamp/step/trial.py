"""What a loss is, mean or sum, found by what it does to two halves.

Keras's own losses say by their reduction how those of pieces make that of
the batch. A function of the user, `add_loss` or an own `compute_loss` does
not. Before training in pieces those are computed once on a batch and on its
halves, without a trace in the model.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfamp import keras_internals, tensorflow_internals
from tfamp.distribute.strategy import split_evenly
from tfamp.errors import InputError
from tfamp.step import losses, terms
from tfamp.step.terms import MEAN, RATIO, SUM, Plan

# Relative; a sum is twice the mean of its halves.
_TOLERANCE, _TOLERANCE_OF_16_BITS, _TOLERANCE_OF_DROPOUT = 1e-4, 0.02, 0.2


def plan_of(
    model: keras.Model,
    element_spec: Any,
    first: Callable[[], Any],
    pieces: int,
    training: bool,
) -> Plan | None:
    """What the terms of a model's loss are; None where nothing is split.

    Args:
        model: compiled and built.
        element_spec: of its batches.
        first: returns a batch, where the loss must be tried on one.
        pieces: of a global batch: replicas times microbatches.
        training: whether as in training.

    Raises:
        InputError: for a loss whose pieces do not make that of the batch.
    """
    if pieces == 1:
        return None
    trial = _Trial(model, first, training)
    if model.run_eagerly:
        trial.data = first()
        found = trial.record(trial.data)
    else:
        with model.distribute_strategy.scope():
            found = trial.trace(element_spec)
    return trial.decide(found)


class _Trial:
    """One batch and its halves, passed through one model."""

    def __init__(self, model, first, training):
        self.model = model
        self.first = first
        self.training = training
        self.data: Any = None
        is_narrow = any(
            keras.backend.standardize_dtype(each.compute_dtype)
            in ("float16", "bfloat16")
            for each in keras_internals.all_layers(model)
            if each.compute_dtype
        )
        self.tolerance = _TOLERANCE_OF_16_BITS if is_narrow else _TOLERANCE

    def trace(self, spec: Any) -> terms.Terms:
        found = []

        @tensorflow_internals.differentiated_within()
        def pass_(data) -> None:
            found.append(losses.recorded(self.model, data, self.training)[0])

        tf.function(pass_, autograph=False).get_concrete_function(spec)
        return found[0]

    def record(self, data: Any) -> terms.Terms:
        return losses.recorded(self.model, data, self.training)[0]

    def decide(self, found: terms.Terms) -> Plan:
        plan = losses.plan_of(found)
        for leaf in found.leaves:
            if leaf.is_scalar_with_weights:
                raise InputError(
                    f"Loss {leaf.name!r} returns one number, which no weight "
                    "or mask of rows can weigh; return one number per row."
                )
        model = self.model
        regularized = sum(
            getattr(v, "regularizer", None) is not None
            for v in model.trainable_variables
        )
        num_added = len(found.added) - regularized
        is_own = type(model).compute_loss is not keras.Model.compute_loss
        unknown = [i for i, f in enumerate(found.leaves) if not f.is_known]
        if not (unknown or num_added > 0 or is_own):
            return plan
        self._take_batch()
        whole, halves, rows = self._measured(found)
        kinds = list(plan.leaves)
        counted = list(plan.counted)
        for i in unknown:
            if kinds[i] == terms.EACH:
                continue
            values = [each["leaves"][i] for each in (whole, *halves)]
            (n, d), (n_a, d_a), (n_b, d_b) = values
            adds_up = self._same(d, d_a + d_b) and (
                self._same(n, n_a + n_b, abs(n_a) + abs(n_b))
            )
            if kinds[i] == RATIO and adds_up:
                continue
            ratios = [n / d if d else 0.0 for n, d in values]
            name = f"Loss {found.leaves[i].name!r}"
            kinds[i], counted[i] = self._kind(name, ratios, rows), False
        added = list(plan.added)
        for i in range(max(num_added, 0)):
            values = [each["added"][i] for each in (whole, *halves)]
            added[i] = self._kind("A loss of add_loss", values, rows)
        plan = Plan(tuple(kinds), tuple(counted), tuple(added))
        factors = self._divisors(found, unknown, num_added, is_own)
        plan = plan._replace(**factors)
        if is_own:
            plan = plan._replace(total=self._kind_of_total(plan, whole, rows))
        return plan

    def _take_batch(self) -> None:
        if self.data is None:
            self.data = self.first()
        if int(split_evenly(self.data, 0, 1)[1]) == 1:
            # Two rows that are alike are halves too.
            self.data = tf.nest.map_structure(
                lambda t: t if t is None else tf.concat([t, t], 0), self.data
            )

    def _measured(self, found):
        """Numbers of the whole batch and of its halves."""
        parts = [split_evenly(self.data, i, 2) for i in range(2)]
        rows = [int(count) for _, count in parts]
        pass_ = self._numbers(training=False)
        whole = self._run(pass_, self.data)
        if len(whole["added"]) != len(found.added):
            # Some come in training only, where dropout draws.
            pass_ = self._numbers(training=self.training)
            self.tolerance = _TOLERANCE_OF_DROPOUT
            whole = self._run(pass_, self.data)
        values = [*whole["added"], *[n for n, _ in whole["leaves"]]]
        if not all(values):
            # What is 0 may be either: look where it is not.
            pass_ = self._numbers(pass_.training, is_moved=True)
            whole = self._run(pass_, self.data)
        self._pass = pass_
        return whole, [self._run(pass_, part) for part, _ in parts], rows

    def _numbers(self, training: bool, is_moved: bool = False):
        # The loss is that which is trained, also where layers draw nothing.
        return _Pass(self.model, training, is_moved, self.training)

    def _run(self, pass_: Callable, data: Any, in_scope: bool = False) -> dict:
        def run():
            function = (
                pass_
                if self.model.run_eagerly
                else tf.function(
                    tensorflow_internals.differentiated_within()(pass_),
                    autograph=False,
                )
            )
            return tf.nest.map_structure(float, function(data))

        if in_scope:
            with self.model.distribute_strategy.scope():
                return run()
        # Another thread is outside of all scopes, where Keras divides by no
        # number of replicas.
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            return executor.submit(run).result()

    def _divisors(self, found, unknown, num_added, is_own) -> dict:
        """Which terms were divided by the number of replicas, as Keras does."""
        replicas = self.model.distribute_strategy.num_replicas_in_sync
        leaves = [1] * len(found.leaves)
        added = [1] * len(found.added)
        total = 1
        if replicas > 1:
            outside = self._run(self._pass, self.data)
            inside = self._run(self._pass, self.data, in_scope=True)
            for i in unknown:
                name = f"Loss {found.leaves[i].name!r}"
                pair = outside["leaves"][i][0], inside["leaves"][i][0]
                leaves[i] = self._divisor(name, *pair, replicas)
            for i in range(max(num_added, 0)):
                pair = outside["added"][i], inside["added"][i]
                added[i] = self._divisor("add_loss", *pair, replicas)
            if is_own:
                name = f"compute_loss of {type(self.model).__name__}"
                pair = outside["total"], inside["total"]
                total = self._divisor(name, *pair, replicas)
        return {
            "leaf_factors": tuple(leaves),
            "added_factors": tuple(added),
            "total_factor": total,
        }

    def _divisor(self, name, outside, inside, replicas) -> int:
        if self._same(outside, inside):
            return 1
        if self._same(outside, inside * replicas):
            return replicas
        raise InputError(
            f"{name} divides only part of it by the number of replicas; use "
            "keras.ops.mean over rows in place of loss objects within it."
        )

    def _kind_of_total(self, plan: Plan, whole: dict, rows: list[int]) -> str:
        counts = [
            d
            for (_, d), is_counted in zip(
                whole["leaves"], plan.counted, strict=True
            )
            if is_counted
        ]
        # Outside of scopes nothing was divided.
        plain = plan._replace(leaf_factors=(), added_factors=(), total_factor=1)
        values: list[Any] = []
        for i in (None, 0, 1):
            data, part = self.data, 1.0
            if i is not None:
                data, _ = split_evenly(self.data, i, 2)
                part = rows[i] / sum(rows)
            pass_ = _PartPass(self._pass, plain, part, counts)
            values.append(self._run(pass_, data))
        name = f"compute_loss of {type(self.model).__name__}"
        return self._kind(name, values, rows)

    def _kind(self, name: str, values: list[float], rows: list[int]) -> str:
        whole, *halves = values
        mean = float(np.average(halves, weights=rows))
        size = max(map(abs, values))
        is_mean = self._same(whole, mean, size)
        is_sum = self._same(whole, sum(halves), size)
        if is_mean and is_sum:
            logging.warning(
                "%s is 0 on the first batch; it is taken for a mean over rows.",
                name,
            )
        if is_mean:
            return MEAN
        if is_sum:
            return SUM
        raise InputError(
            f"{name} is neither a mean nor a sum over rows: {whole:.6g} on a "
            f"batch, {halves[0]:.6g} and {halves[1]:.6g} on its halves; train "
            "it on one replica with microbatches=1, or return one number per "
            "row."
        )

    def _same(self, one: float, other: float, size: float = 0.0) -> bool:
        size = max(abs(one), abs(other), size)
        return abs(one - other) <= self.tolerance * size


class _Pass:
    """A pass over some rows that returns each term and the whole loss."""

    def __init__(self, model, training, is_moved, of_training):
        self.model = model
        self.training = training
        self.is_moved = is_moved
        self.of_training = of_training

    def __call__(self, data) -> dict:
        found, total = losses.recorded(
            self.model, data, self.training, self.is_moved, self.of_training
        )
        return {
            "leaves": [
                (tf.reduce_sum(leaf.numerator), leaf.denominator)
                for leaf in found.leaves
            ],
            "added": found.added,
            "total": tf.reduce_sum(total),
        }


class _PartPass:
    """A pass over a piece that returns its part of the loss."""

    def __init__(self, pass_, plan, part, counts):
        self.model, self.training = pass_.model, pass_.training
        self.is_moved, self.of_training = pass_.is_moved, pass_.of_training
        self.plan, self.part, self.counts = plan, part, counts

    def __call__(self, data) -> tf.Tensor:
        model = self.model
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)

        def pass_():
            outputs = losses.call(model, x, self.training)
            loss, _ = losses.loss_of_piece(
                model,
                self.plan,
                tf.constant(self.part),
                [tf.constant(each, tf.float32) for each in self.counts],
                (x, y, outputs, weight),
                training=self.of_training,
            )
            return loss

        return terms.run_unseen(model, pass_, self.is_moved)
