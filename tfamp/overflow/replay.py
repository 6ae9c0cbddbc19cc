"""Runs a skipped step again, on its replicas, and measures what flows.

The same batch, weights, seeds and scale; then at scale 1, and in float32. All
workers replay together, since they all skipped the step; afterwards the state
is what it was. Not the same is XLA, which a replay leaves out, and what a
`train_step` of the model's own changed before its optimizer skipped.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfamp import keras_internals, tensorflow_internals
from tfamp.accumulation.trace import summing_in_float32
from tfamp.distribute import reduction
from tfamp.distribute.consensus import number_of_workers
from tfamp.distribute.strategy import Share, split_evenly
from tfamp.overflow.blame import Blame, verdict
from tfamp.overflow.caught import Catch, Caught
from tfamp.overflow.first import Pass, Point, Table, first_culprit
from tfamp.overflow.kept_step import KeptStep
from tfamp.overflow.marks import Mark, marking, size_of
from tfamp.precision.layer_paths import walk
from tfamp.precision.policy import precision_of
from tfamp.scaling.optimizer import LossScaleOptimizer
from tfamp.step.build import remember
from tfamp.taps.parts import Taps, layers_of, operations_of

_NOT_IN_FLOAT32 = (
    tf.errors.InvalidArgumentError,
    tf.errors.ResourceExhaustedError,
)
_UNKNOWN = Blame(
    "unknown",
    "Running the step again gave finite numbers only: XLA, a random operation "
    "without a Keras seed, or the model's own train_step made the difference.",
)


class Replay:
    """Finds out what was at fault in the step that was skipped last.

    Args:
        model: compiled and built.
        step: one step of it, for a whole share, without XLA.
        optimizers: those that may have skipped, by name.
        kept: what keeps the skipped step.
        microbatches: pieces that each replica's share is trained on in.
    """

    def __init__(
        self,
        model: keras.Model,
        step: Callable[[Share], Any],
        optimizers: Mapping[str, LossScaleOptimizer],
        kept: KeptStep,
        microbatches: int = 1,
    ):
        self._model = model
        self._strategy = model.distribute_strategy
        self._step = step
        self._optimizers = list(optimizers.values())
        self._kept = kept
        self._microbatches = microbatches
        # Traced at the first overflow, and there for the next ones.
        self._as_it_was = self._tracing(precision_of(model) != "float32")
        self._all_in_float32 = self._tracing(False)

    def __call__(self) -> Blame:
        """Replays the step, on all workers together."""
        try:
            with contextlib.ExitStack() as stack:
                for optimizer in self._optimizers:
                    if optimizer.shards is not None:
                        stack.enter_context(optimizer.shards.whole_weights())
                return self._blame()
        except tf.errors.ResourceExhaustedError:
            return Blame(
                "unknown",
                "There is too little memory to run the step again and look.",
            )

    def _blame(self) -> Blame:
        with self._state_restored():
            share, state = self._kept.load()
            scales = self._kept.scales()
            for piece in range(self._microbatches):
                seen, after = self._as_it_was(scales, share, state, piece)
                if first_culprit(seen) is not None:
                    break
                state = after
            else:
                return _UNKNOWN
            ones = [1.0] * len(scales)
            unscaled = None
            if any(
                optimizer.dynamic and scale != 1
                for optimizer, scale in zip(
                    self._optimizers, scales, strict=True
                )
            ):
                unscaled, _ = self._as_it_was(ones, share, state, piece)
            return verdict(
                seen,
                unscaled,
                self._in_float32(seen, ones, share, state, piece),
                scale=max(scales),
                workers=number_of_workers(self._strategy),
            )

    def _in_float32(
        self, seen: Pass, scales, share, state, piece
    ) -> Pass | None:
        if precision_of(self._model) == "float32":
            return None
        layers = [
            layer
            for layer in keras_internals.all_layers(self._model)
            # A quantized layer has no other arithmetic.
            if layer.quantization_mode is None
        ]
        float32 = keras.dtype_policies.get("float32")
        try:
            with keras_internals.dtype_policy_replaced(layers, float32):
                other, _ = self._all_in_float32(scales, share, state, piece)
        except (TypeError, ValueError, *_NOT_IN_FLOAT32) as error:
            # Code that casts to 16 bits by name, or memory for 16 bits only.
            logging.info("The step does not run in float32: %s", error)
            return None
        is_alike = all(
            len(getattr(other, stage).points)
            == len(getattr(seen, stage).points)
            for stage in ("forward", "gradients", "sums")
        )
        return other if is_alike else None

    def _tracing(self, is_narrow: bool) -> Callable[..., tuple[Pass, Any]]:
        """A function that replays and measures; traced at its first call."""
        names: dict[str, list[Point]] = {}
        taps = Taps(layers_of(self._model) + operations_of(self._model))
        catch = Catch(self._optimizers)

        def run(share, state, piece):
            def on_replica(share, state):
                sizes, after = self._measure(
                    share, state, piece, taps, catch, names
                )
                return reduction.gather([sizes])[0], after

            with (
                keras_internals.additional_losses_in_float32(self._model),
                taps.attached(),
                catch.attached(),
            ):
                return self._strategy.run(on_replica, args=(share, state))

        # A sum that overflows 16 bits in a replay did not do so in the step.
        run = tensorflow_internals.graph_function(
            summing_in_float32(run) if is_narrow else run, relaxes=True
        )

        def measure(scales, share, state, piece) -> tuple[Pass, Any]:
            for optimizer, scale in zip(self._optimizers, scales, strict=True):
                optimizer.dynamic_scale.assign(scale)
            gathered, after = run(share, state, tf.constant(piece))
            local = self._strategy.experimental_local_results(gathered)
            return _pass_of(names, local[0].numpy()), after

        return measure

    def _measure(self, share, state, piece, taps, catch, names):
        """float64 [N]: sizes of all that is looked at, in replica context.

        Rows of the data come last.
        """
        before = self._kept.state()
        forget = remember(
            [
                variable
                for variable in self._model.non_trainable_variables
                if keras.backend.is_float_dtype(variable.dtype)
            ]
            + self._model.metrics_variables
        )
        self._kept.assign_random_state(state)
        data, rows = _look_at_data(share)
        weights = [
            (Point(v.path), size_of(v))
            for v in self._model.weights
            if keras.backend.is_float_dtype(v.dtype)
        ]
        if self._microbatches > 1:
            part, count = split_evenly(share.data, piece, self._microbatches)
            count = tf.minimum(count, share.rows)
            share = Share(part, count, share.batch_rows)
        marks: list[Mark] = []
        caught = Caught()
        with taps.watching(marking(marks)), catch.catching(caught):
            self._step(share)
        after = self._kept.state()
        forget()
        self._kept.assign_random_state(before)
        nothing = tf.constant(0.0, tf.float64)
        points = [Point(mark.side, mark.layer, mark.dtype) for mark in marks]
        # An inner layer comes after the one that holds it.
        owners = {
            id(variable): place
            for place in walk(self._model)
            for variable in place.layer.weights
        }
        tables = {
            "data": data,
            "weights": weights,
            "forward": [
                (p, m.forward) for p, m in zip(points, marks, strict=True)
            ],
            "losses": [(Point("loss"), loss) for loss in caught.losses],
            "backward": [
                (p, nothing if m.backward is None else m.backward)
                for p, m in zip(points, marks, strict=True)
            ],
            "gradients": caught.gradients(owners),
            "sums": caught.sums(owners),
        }
        for name, table in tables.items():
            names[name] = [point for point, _ in table]
        sizes = [size for table in tables.values() for _, size in table]
        return tf.stack([*sizes, *rows]), after

    @contextlib.contextmanager
    def _state_restored(self) -> Iterator[None]:
        """Puts back weights, optimizers and scales; a step may assign them.

        What replicas hold for themselves is put back where it is changed.
        """
        variables = []
        if type(self._model).train_step is not keras.Model.train_step:
            # Keras's changes none but through the optimizer, which is caught.
            variables += self._model.trainable_variables
        for optimizer in self._optimizers:
            variables.append(optimizer.dynamic_scale)
        values = [keras.ops.convert_to_numpy(v) for v in variables]
        try:
            yield
        finally:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)


def _look_at_data(
    share: Share,
) -> tuple[list[tuple[Point, tf.Tensor]], list[tf.Tensor]]:
    """Sizes of the data, and rows of the global batch where they go wrong."""
    replica = tf.distribute.get_replica_context()
    first_row = (
        tf.cast(replica.replica_id_in_sync_group, tf.int64)
        * share.batch_rows
        // replica.num_replicas_in_sync
    )
    parts = keras.utils.unpack_x_y_sample_weight(share.data)
    sizes, rows = [], []
    for name, part in zip(
        ("inputs", "targets", "sample weights"), parts, strict=True
    ):
        for path, value in keras.tree.flatten_with_path(part):
            row = tf.constant(-1, tf.int64)
            if isinstance(value, tf.RaggedTensor):
                value = value.flat_values
            elif isinstance(value, tf.SparseTensor):
                value = value.values
            elif _is_floating(value):
                row = first_row + _first_bad_row(value)
            if _is_floating(value):
                keys = "".join(f"[{key!r}]" for key in path)
                point = Point(f"{name}{keys}", dtype=value.dtype.name)
                sizes.append((point, size_of(value)))
                rows.append(tf.cast(row, tf.float64))
    return sizes, rows


def _first_bad_row(value: tf.Tensor) -> tf.Tensor:
    by_row = tf.reshape(value, [tf.shape(value)[0], -1])
    good = tf.reduce_all(tf.math.is_finite(by_row), axis=1)
    return tf.argmin(tf.cast(good, tf.int32))


def _is_floating(value: Any) -> bool:
    return isinstance(value, tf.Tensor) and value.dtype.is_floating


def _pass_of(names: Mapping[str, list[Point]], sizes: np.ndarray) -> Pass:
    """Cuts sizes [replicas, N] into the tables that they were."""
    tables, begin = {}, 0
    for name, points in names.items():
        end = begin + len(points)
        tables[name] = Table(points, sizes[:, begin:end])
        begin = end
    return Pass(**tables, rows=sizes[:, begin:].astype(np.int64))
