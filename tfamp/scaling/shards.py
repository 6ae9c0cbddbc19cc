"""Masters and moments in pieces, one for each replica (ZeRO, stage 1).

Float32 masters and moments are what mixed precision does not make smaller.
Here each replica holds and updates 1/R of every weight, and gets the rest of
the weights from the others after each step. (Rajbhandari et al. 2020, "ZeRO:
Memory Optimizations Toward Training Trillion Parameter Models".)

A piece is a flat stretch of one weight, filled up with zeros at the end: the
optimizer has as many variables, in the same order, as without shards, and what
a checkpoint holds does not depend on how many replicas there were.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.errors import InputError
from tfamp.scaling.gradients import Gradient, map_values

# They compute each value of a weight from that value's gradient alone.
ELEMENTWISE = (
    *(keras.optimizers.Adadelta, keras.optimizers.Adagrad),
    *(keras.optimizers.Adam, keras.optimizers.Adamax),
    *(keras.optimizers.AdamW, keras.optimizers.Ftrl, keras.optimizers.Lion),
    *(keras.optimizers.Nadam, keras.optimizers.RMSprop, keras.optimizers.SGD),
)


class Piece(NamedTuple):
    """A variable of which each replica holds a stretch.

    variable: the stretch, flat; another one on each replica.
    whole_path: of the variable that an optimizer without shards has.
    weight: the model's variable that it belongs to.
    """

    variable: keras.Variable
    whole_path: str
    weight: keras.Variable


class Shards:
    """The pieces of an optimizer's weights and of its moments.

    Make it in the strategy's scope.

    Args:
        optimizer: acts element by element; it is built here, on the pieces.
        weights: of the model, whole.

    Attributes:
        strategy: whose replicas share.
        weights: those weights.
        masters: a piece of each weight, in its dtype.
        whole_weights: makes a context in which each weight is whole and in its
            own dtype, also in graphs; all workers enter it together.

    Raises:
        InputError: for an optimizer, a weight or a strategy that does not go
            with shards.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        weights: Sequence[keras.Variable],
    ):
        check_can_shard(optimizer)
        _check_weights(weights)
        strategy = tf.distribute.get_strategy()
        if isinstance(strategy, tf.distribute.TPUStrategy):
            raise InputError(
                "shard=True works on CPUs and GPUs, and the strategy is of "
                "TPUs; leave it out."
            )
        self.strategy = strategy
        self._optimizer = optimizer
        self.weights = list(weights)
        self.whole_weights: Callable[
            [], contextlib.AbstractContextManager[None]
        ] = contextlib.nullcontext
        self.masters = [self._piece_of(w, w.name, "zeros") for w in weights]
        # Those that Keras knows what to decay by; they may be replaced.
        self._stored = [keras_internals.stored(w) for w in weights]
        self._index = {id(w): i for i, w in enumerate(self.weights)}
        self._moments: dict[int, Piece] = {}
        # Weights, by their ids, in the step that is being traced.
        self._sparse: set[int] = set()
        with keras_internals.variables_made_by(optimizer, self._make_moment):
            optimizer.build(self.masters)
        # A file of Keras holds the variables of both optimizers.
        optimizer.save_own_variables = lambda store: self.save(
            optimizer.variables, store
        )
        optimizer.load_own_variables = lambda store: self.load(
            optimizer.variables, store
        )
        # Wholes of the end of a training, by the ids of their pieces.
        self._kept: dict[int, np.ndarray] = {}
        self._kept_at = -1
        if tf.executing_eagerly():
            self.follow_all()

    def holds(self, variable: keras.Variable) -> bool:
        """Whether it is one of the weights."""
        return id(variable) in self._index

    def masters_of(
        self, weights: Sequence[keras.Variable]
    ) -> list[keras.Variable]:
        """The pieces of those weights.

        Raises:
            ValueError: for one that the optimizer was not built with.
        """
        for weight in weights:
            if id(weight) not in self._index:
                raise ValueError(
                    f"Unknown variable {weight.path}: the optimizer was not "
                    "built with it."
                )
        return [self.masters[self._index[id(weight)]] for weight in weights]

    def decays(self, piece) -> bool:
        """Whether weight decay applies to the weight of a piece."""
        index = keras_internals.variable_index(self._optimizer, piece)
        return keras_internals.decays(self._optimizer, self._stored[index])

    def whole_size(self, piece) -> int:
        """How many values the weight of a piece has."""
        return math.prod(self._weight(piece).shape)

    def is_sparse(self, piece) -> bool:
        """Whether the gradient of a piece's weight came as rows of it."""
        return id(self._weight(piece)) in self._sparse

    def wide(
        self,
        gradients: Sequence[Gradient],
        weights: Sequence[keras.Variable],
    ) -> list[Gradient]:
        """Gradients in the dtypes of the masters, as those of whole weights."""
        return [
            map_values(functools.partial(tf.cast, dtype=master.dtype), gradient)
            for gradient, master in zip(
                gradients, self.masters_of(weights), strict=True
            )
        ]

    def parts(
        self,
        gradients: Sequence[Gradient],
        weights: Sequence[keras.Variable],
    ) -> list[Gradient]:
        """This replica's stretches of whole gradients, in replica context."""
        self._sparse = {
            id(weight)
            for gradient, weight in zip(gradients, weights, strict=True)
            if isinstance(gradient, tf.IndexedSlices)
        }
        return [
            None
            if gradient is None
            else self._part(tf.convert_to_tensor(gradient), weight)
            for gradient, weight in zip(gradients, weights, strict=True)
        ]

    def follow(self, weights: Sequence[keras.Variable]) -> None:
        """Takes over weights that were set from outside, in replica context.

        A weight that is not what its master was rounded to was set by someone:
        by `set_weights`, a file, or a callback. The master would undo that.
        """
        for weight, master in zip(
            weights, self.masters_of(weights), strict=True
        ):
            value = self._part(
                tf.convert_to_tensor(keras_internals.stored(weight)), weight
            )
            before = tf.convert_to_tensor(master.value)
            is_same = tf.equal(tf.cast(before, value.dtype), value)
            master.value.assign(
                tf.where(is_same, before, tf.cast(value, before.dtype))
            )

    def publish(self, weights: Sequence[keras.Variable]) -> None:
        """Gives all replicas the whole weights, in replica context.

        They cross in the dtype that they are kept in.
        """
        masters = self.masters_of(weights)
        pieces = [
            tf.cast(
                tf.convert_to_tensor(master.value),
                keras_internals.stored(weight).dtype,
            )
            for master, weight in zip(masters, weights, strict=True)
        ]
        values = [
            _whole(rows, weight.shape)
            for rows, weight in zip(self._gather(pieces), weights, strict=True)
        ]
        variables = [keras_internals.stored(weight) for weight in weights]

        def assign(strategy, variables, values) -> None:
            for variable, value in zip(variables, values, strict=True):
                strategy.extended.update(
                    variable, _assign, args=(value,), group=False
                )

        tf.__internal__.distribute.interim.maybe_merge_call(
            assign, self.strategy, variables, values
        )

    def overwrite_with_averages(self) -> None:
        """Masters become their averages, in cross-replica context."""
        for master, average in keras_internals.moving_averages(self._optimizer):
            self.strategy.extended.update(
                master.value, _assign, args=(average.value,), group=False
            )

    def finalize(self) -> None:
        """Weights become the averages; all workers must call it together."""
        self.follow_all()
        self.overwrite_with_averages()
        self.publish_all()

    def follow_all(self) -> None:
        """`follow` on all replicas, for all weights."""
        self._run_in_graph(self.follow)

    def publish_all(self) -> None:
        """`publish` on all replicas, for all weights."""
        self._run_in_graph(self.publish)

    def _run_in_graph(self, function) -> None:
        # Traced anew: weights may be kept in other variables than last time.
        traced = tf.function(
            lambda: self.strategy.run(function, (self.weights,)),
            autograph=False,
        )
        traced.get_concrete_function()()

    def moment(self, variable: keras.Variable) -> Piece | None:
        """What is known of a variable of the optimizer; None for scalars."""
        return self._moments.get(id(variable))

    def read_whole(self, piece: Piece | keras.Variable) -> np.ndarray:
        """The whole value of a piece, on the host, without the other workers.

        Args:
            piece: of a moment, or a weight of the model, whose master it is.

        Raises:
            InputError: on several workers, but after a training.
        """
        if self.has_all_here():
            return self.gather_whole(piece)
        variable, _ = self._variable_and_weight(piece)
        if (
            id(variable) not in self._kept
            or self._kept_at != self._optimizer.iterations.numpy()
        ):
            raise InputError(
                "The optimizer is in shards on several workers, none of which "
                "has all of it during the training; save the model after "
                "tfamp.fit, or give it a checkpoint_dir."
            )
        return self._kept[id(variable)]

    def gather_whole(self, piece: Piece | keras.Variable) -> np.ndarray:
        """As `read_whole`, at any time; all workers must call it together."""
        variable, weight = self._variable_and_weight(piece)
        results = self.strategy.experimental_local_results
        if self.has_all_here():
            rows = [component.numpy() for component in results(variable.value)]
        else:

            @tf.function(autograph=False)
            def gather():
                return self.strategy.run(
                    lambda: self._gather(
                        [tf.convert_to_tensor(variable.value)]
                    )[0]
                )

            rows = results(gather.get_concrete_function()())[0].numpy()
        size = math.prod(weight.shape)
        return np.concatenate(rows)[:size].reshape(tuple(weight.shape))

    def save(self, variables: Sequence[keras.Variable], store: Any) -> None:
        """Writes variables of the optimizer, whole, as Keras does."""
        for i, variable in enumerate(variables):
            piece = self.moment(variable)
            store[str(i)] = (
                self.read_whole(piece) if piece else variable.numpy()
            )

    def load(self, variables: Sequence[keras.Variable], store: Any) -> None:
        """Takes what `save` wrote, or an optimizer without shards."""
        for i, variable in enumerate(variables):
            piece = self.moment(variable)
            if piece:
                self.write_whole(piece, store[str(i)])
            else:
                variable.assign(store[str(i)])

    def keep_wholes(self) -> None:
        """Keeps what `read_whole` gives on the first worker of several.

        All workers must call it together.
        """
        if self.has_all_here():
            return
        kept = {}
        pieces = [*self.weights, *self._moments.values()]
        for piece in pieces:
            whole = self.gather_whole(piece)
            if self.strategy.extended.should_checkpoint:
                kept[id(self._variable_and_weight(piece)[0])] = whole
        self._kept = kept
        self._kept_at = int(self._optimizer.iterations.numpy())

    def has_all_here(self) -> bool:
        """Whether all replicas are of this process."""
        local = self.strategy.experimental_local_results(self.masters[0].value)
        return len(local) == self._replicas

    def write_whole(self, piece: Piece | keras.Variable, value) -> None:
        """Gives each replica its stretch of a whole value.

        Args:
            piece: as for `read_whole`.
            value: an array, or a tensor on the host, of the weight's shape.
        """
        variable, weight = self._variable_and_weight(piece)
        if tuple(value.shape) != tuple(weight.shape):
            raise ValueError(
                f"{tuple(value.shape)} for {weight.path}, whose shape is "
                f"{tuple(weight.shape)}."
            )

        value = tf.cast(tf.constant(np.asarray(value)), variable.dtype)
        if self.has_all_here():
            flat = tf.reshape(value, [-1])
            length = variable.shape[0]
            missing = length * self._replicas - flat.shape[0]
            rows = tf.reshape(tf.pad(flat, [[0, missing]]), [-1, length])
            components = self.strategy.experimental_local_results(
                variable.value
            )
            for component, row in zip(components, rows, strict=True):
                component.assign(row)
        else:

            def assign(value) -> None:
                variable.value.assign(self._part(value, weight))

            traced = tf.function(
                lambda value: self.strategy.run(assign, (value,)),
                autograph=False,
            )
            traced.get_concrete_function(value)(value)
        if weight is piece:
            stored = keras_internals.stored(weight)
            stored.assign(tf.cast(value, stored.dtype))

    def _part(self, value: tf.Tensor, weight: keras.Variable) -> tf.Tensor:
        """This replica's stretch of a whole value, in replica context."""
        size, replicas = math.prod(weight.shape), self._replicas
        flat = tf.ensure_shape(tf.reshape(value, [-1]), [size])
        if replicas == 1:
            return flat
        length = -(-size // replicas)
        if size % replicas:
            flat = tf.pad(flat, [[0, length * replicas - size]])
        replica = tf.distribute.get_replica_context()
        begin = tf.cast(replica.replica_id_in_sync_group, tf.int32) * length
        return tf.slice(flat, [begin], [length])

    def _variable_and_weight(self, piece):
        if isinstance(piece, Piece):
            return piece.variable, piece.weight
        return self.masters_of([piece])[0], piece

    @property
    def _replicas(self) -> int:
        return self.strategy.num_replicas_in_sync

    def _weight(self, piece) -> keras.Variable:
        return self.weights[
            keras_internals.variable_index(self._optimizer, piece)
        ]

    def _piece_of(
        self, weight: keras.Variable, name: str, initializer
    ) -> keras.Variable:
        # Nobody may read one replica's stretch as if it were all: TensorFlow
        # refuses to read such a variable in cross-replica context.
        return keras.Variable(
            initializer=keras.initializers.get(initializer),
            shape=(-(-math.prod(weight.shape) // self._replicas),),
            dtype=weight.dtype,
            trainable=False,
            aggregation="none",
            synchronization="on_read" if self._replicas > 1 else "auto",
            name=name,
        )

    def _make_moment(self, reference, name: str, initializer) -> keras.Variable:
        index = next(
            i for i, master in enumerate(self.masters) if master is reference
        )
        weight = self.weights[index]
        name = f"{weight.path.replace('/', '_')}_{name}"
        variable = self._piece_of(weight, name, initializer)
        # Its path has the optimizer's name in front, as ever.
        self._moments[id(variable)] = Piece(variable, variable.path, weight)
        return variable

    def _gather(self, pieces: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Of each flat piece, a row for each replica, bit by bit."""
        if self._replicas == 1:
            return [piece[tf.newaxis] for piece in pieces]
        replica = tf.distribute.get_replica_context()
        gathered = list(pieces)
        dtypes = {piece.dtype for piece in pieces}
        # One collective for each dtype.
        for dtype in sorted(dtypes, key=lambda each: each.name):
            chosen = [
                i for i, piece in enumerate(pieces) if piece.dtype == dtype
            ]
            flat = tf.concat([pieces[i] for i in chosen], axis=0)
            if dtype == tf.bfloat16:
                # No collective gathers bfloat16.
                flat = tf.bitcast(flat, tf.float16)
            rows = replica.all_gather(flat[tf.newaxis], axis=0)
            # It forgets how many replicas there are.
            rows = tf.ensure_shape(rows, [self._replicas, flat.shape[0]])
            if dtype == tf.bfloat16:
                rows = tf.bitcast(rows, tf.bfloat16)
            begin = 0
            for i in chosen:
                end = begin + pieces[i].shape[0]
                gathered[i] = rows[:, begin:end]
                begin = end
        return gathered


def check_can_shard(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises `InputError` for one that needs more than an element at a time."""
    name = type(optimizer).__name__
    if type(optimizer) not in ELEMENTWISE or not keras_internals.updates_as(
        optimizer, type(optimizer)
    ):
        names = ", ".join(each.__name__ for each in ELEMENTWISE)
        raise InputError(
            f"shard=True takes optimizers that act element by element, and "
            f"{name} is not known to; use one of {names}, or leave it out."
        )
    for option in ("gradient_accumulation_steps", "loss_scale_factor"):
        if getattr(optimizer, option):
            raise InputError(
                f"{name}({option}=...) does not go with shard=True; use "
                "tfamp.fit(microbatches=...) and a LossScaleOptimizer instead."
            )


def _check_weights(weights: Sequence[keras.Variable]) -> None:
    for weight in weights:
        if weight.constraint is not None:
            raise InputError(
                f"{weight.path} has a constraint, which needs the whole "
                "weight; leave it or shard=True out."
            )
        if keras_internals.overwrites_with_gradient(weight):
            raise InputError(
                f"{weight.path} is a float8 scale or history, which shards do "
                "not hold; leave float8 or shard=True out."
            )


def _whole(rows: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """[R, N] as the value that the rows are the stretches of."""
    flat = tf.reshape(rows, [-1])
    return tf.reshape(flat[: math.prod(shape)], shape)


def _assign(variable: tf.Variable, value) -> None:
    variable.assign(value)
