"""Weights in 16 bits while they train, where their masters are in shards.

A layer that computes in 16 bits reads a rounded copy of each weight. Where
the float32 weight is in shards already, as masters, a replica needs the copy
alone: 2 bytes instead of 4 and 2. What a model reads in any other way, or
more than once, stays float32: the sums of its gradients would be rounded.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfamp import keras_internals
from tfamp.errors import InputError
from tfamp.scaling.shards import Shards
from tfamp.step import losses

_NARROW = ("bfloat16", "float16")


@contextlib.contextmanager
def in_16_bits(model: keras.Model, element_spec: Any) -> Iterator[None]:
    """Within it, a model in shards has weights of 16 bits where it can.

    All workers must enter and leave it together. After it, the weights are
    float32 again, and what their masters are.

    Args:
        model: compiled and built; one whose optimizer is not in shards stays.
        element_spec: of a batch.
    """
    optimizer = model.optimizer
    shards = getattr(optimizer, "shards", None)
    if shards is None or not _computes_as_keras(model):
        yield
        return
    chosen = narrow_weights(model, shards, element_spec)
    shards.follow_all()
    logging.info(
        "Shards: %d of %d weights are kept in 16 bits.",
        len(chosen),
        len(model.trainable_variables),
    )
    wides = {}
    for weight, dtype in chosen:
        wides[id(weight)] = _narrow(weight, dtype, shards)
    shards.whole_weights = functools.partial(
        _whole, [(weight, wides[id(weight)]) for weight, _ in chosen], shards
    )
    # Keras's own functions were traced with the wide ones.
    _forget_functions(model)
    is_whole = False
    try:
        yield
        shards.follow_all()
        is_whole = True
    finally:
        shards.whole_weights = contextlib.nullcontext
        for weight, _ in chosen:
            _widen(weight, wides[id(weight)], shards, is_whole)
        _forget_functions(model)
    shards.keep_wholes()


def narrow_weights(
    model: keras.Model, shards: Shards, element_spec: Any
) -> list[tuple[keras.Variable, str]]:
    """The weights that the model reads once, in 16 bits, and in which.

    Args:
        model: compiled and built.
        shards: which hold the masters.
        element_spec: of a batch.
    """
    candidates = [
        weight
        for weight in model.trainable_variables
        if shards.holds(weight)
        and weight.dtype == "float32"
        and weight.regularizer is None
    ]
    x, _, _ = keras.utils.unpack_x_y_sample_weight(
        keras_internals.symbolic_batch(element_spec)
    )
    chosen = {id(weight): weight for weight in candidates}
    dtypes: dict[int, str] = {}
    for training in (True, False):
        reads = _reads(model, x, training, candidates)
        for key, found in reads.items():
            if (
                len(found) != 1
                or found[0] not in _NARROW
                or dtypes.setdefault(key, found[0]) != found[0]
            ):
                chosen.pop(key, None)
    return [(weight, dtypes[key]) for key, weight in chosen.items()]


def _reads(
    model: keras.Model,
    x: Any,
    training: bool,
    weights: list[keras.Variable],
) -> dict[int, list[str | None]]:
    """How each weight is read in a call: the dtype, once for each time.

    None is a dtype of no autocast, or what a loop or a branch reads.
    """
    found: dict[int, list[str | None]] = {id(w): [] for w in weights}

    def call(x):
        outermost = tf.compat.v1.get_default_graph()

        def note(weight) -> None:
            is_here = tf.compat.v1.get_default_graph() is outermost
            dtype = keras_internals.autocast_dtype()
            found[id(weight)].append(dtype if is_here else None)

        with keras_internals.reads_noted(weights, note):
            return losses.call(model, x, training=training)

    keras_internals.run_symbolically(call, x)
    return found


class _NarrowWeight(keras.Variable):
    """A weight that is kept in 16 bits; its float32 value is in shards."""

    shards: Shards

    @property
    def value(self):
        stored = keras_internals.stored(self)
        is_replaced = keras_internals.in_stateless_scope()
        if is_replaced or keras_internals.autocast_dtype() == stored.dtype.name:
            return super().value
        if tf.executing_eagerly():
            return tf.constant(self.numpy())
        raise InputError(
            f"{self.path} is in shards and in 16 bits while it trains, and is "
            "read here in another way than by the call of its layer; leave "
            "shard=True out."
        )

    def numpy(self) -> np.ndarray:
        master = tf.constant(self.shards.read_whole(self))
        stored = self.shards.strategy.experimental_local_results(
            keras_internals.stored(self)
        )[0]
        # What was set from outside counts, as in the next step.
        is_same = tf.equal(tf.cast(master, stored.dtype), stored)
        return tf.where(is_same, master, tf.cast(stored, master.dtype)).numpy()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del copy
        value = self.numpy()
        return value if dtype is None else value.astype(dtype)

    def _direct_assign(self, value) -> None:
        if tf.executing_eagerly() and tf.distribute.in_cross_replica_context():
            self.shards.write_whole(self, value)
        else:
            super()._direct_assign(value)

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return {"VARIABLE_VALUE": tf.constant(self.numpy())}

    def _restore_from_tensors(self, restored_tensors) -> None:
        self.assign(restored_tensors["VARIABLE_VALUE"])


def _narrow(
    weight: keras.Variable, dtype: str, shards: Shards
) -> tuple[type, tf.Variable]:
    """Replaces the weight's variable; returns what to undo it with."""
    wide = keras_internals.stored(weight)
    strategy = shards.strategy
    value = tf.cast(strategy.experimental_local_results(wide)[0], dtype)
    with strategy.scope():
        narrow = tf.Variable(
            value,
            dtype=dtype,
            trainable=True,
            name=weight.name,
            aggregation=wide.aggregation,
        )
    before = type(weight)
    weight.shards = shards
    keras_internals.replace_value(weight, narrow, _NarrowWeight)
    _empty(wide, shards)
    return before, wide


def _widen(
    weight: keras.Variable,
    undo: tuple[type, tf.Variable],
    shards: Shards,
    is_whole: bool,
) -> None:
    before, wide = undo
    # Where a worker failed, the others cannot be asked for their parts.
    if is_whole or shards.has_all_here():
        value = tf.constant(shards.gather_whole(weight))
    else:
        local = shards.strategy.experimental_local_results(
            keras_internals.stored(weight)
        )
        value = tf.cast(local[0], wide.dtype)
    for component in shards.strategy.experimental_local_results(wide):
        _put(component, value)
    keras_internals.replace_value(weight, wide, before)
    del weight.shards


@contextlib.contextmanager
def _whole(
    chosen: Sequence[tuple[keras.Variable, tuple[type, tf.Variable]]],
    shards: Shards,
) -> Iterator[None]:
    """Within it the weights are float32; all workers enter it together.

    What was traced with those of 16 bits finds them there again after it.
    """
    narrows = []
    try:
        for weight, undo in chosen:
            narrow = keras_internals.stored(weight)
            _widen(weight, undo, shards, is_whole=True)
            narrows.append(narrow)
        yield
    finally:
        for (weight, (_, wide)), narrow in zip(chosen, narrows, strict=False):
            weight.shards = shards
            keras_internals.replace_value(weight, narrow, _NarrowWeight)
            _empty(wide, shards)


def _empty(wide: tf.Variable, shards: Shards) -> None:
    """Frees the memory: the variable keeps its place, for what holds on to it.

    Whatever was traced with it fails until it is whole again.
    """
    for component in shards.strategy.experimental_local_results(wide):
        _put(component, tf.zeros([0], wide.dtype))


def _put(variable: tf.Variable, value: tf.Tensor) -> None:
    """Assigns a value of any shape."""
    with tf.device(variable.device):
        tf.raw_ops.AssignVariableOp(
            resource=variable.handle,
            value=tf.identity(value),
            validate_shape=False,
        )


def _computes_as_keras(model: keras.Model) -> bool:
    """Else it may read weights past the calls of its layers."""
    return all(
        getattr(type(model), name) is getattr(keras.Model, name)
        for name in ("train_step", "test_step", "compute_loss")
    )


def _forget_functions(model: keras.Model) -> None:
    for name in ("train_function", "test_function", "predict_function"):
        setattr(model, name, None)
