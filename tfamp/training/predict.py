"""`predict`: the outputs of a model for each row, over any strategy."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals, tensorflow_internals
from tfamp.distribute import reduction
from tfamp.distribute.consensus import is_chief
from tfamp.distribute.parting import part
from tfamp.distribute.strategy import distribute_batches
from tfamp.distribute.workers import worker_errors
from tfamp.errors import InputError
from tfamp.training import (
    hooks,
    misplaced,
    preconditions,
    programs,
    safe,
    swapped_averages,
)
from tfamp.training.data import Batches, is_multi_worker


def predict(
    model: keras.Model,
    x: Any,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    callbacks: Any = None,
    verbose: int | str = 0,
) -> Any:
    """The outputs of a model, rows in the order of x and each once.

    Args:
        model: any Keras model; it need not be compiled.
        x: arrays or batches, as for `fit`; targets are left aside.
        batch_size: rows of a global batch, for arrays; None for 32.
        steps: batches to predict; None for all.
        callbacks: any Keras callbacks.
        verbose: anything but 0 prints how many batches there were.

    Returns:
        NumPy arrays in the structure of the model's outputs; 16-bit floats
        come in float32. On several workers, each gets all rows.

    Raises:
        InputError: for data that cannot be used.
        WorkerLostError: another worker stopped answering.
    """
    preconditions.check_runs_eagerly("tfamp.predict")
    preconditions.check_counts({"steps": steps, "batch_size": batch_size})
    misplaced.check_scope(model)
    strategy = model.distribute_strategy
    tensorflow_internals.separate_collectives(strategy)
    batches = Batches(x, strategy=strategy, batch_size=batch_size, steps=steps)
    if batches.steps is None:
        preconditions.check_ends(batches.dataset)
    is_custom = type(model).predict_step is not keras.Model.predict_step
    with strategy.scope():
        safe.build_layers(model, batches.dataset.element_spec, is_custom)
    callbacks = hooks.flattened(callbacks)
    # In one element, so that no structure of x is taken for another.
    is_tuple = isinstance(batches.dataset.element_spec, tuple)
    dataset = batches.dataset.map(
        lambda *batch: {"batch": batch if is_tuple else batch[0]}
    )
    program = programs.lent(
        model,
        ("predict", dataset.element_spec, model.run_eagerly),
        functools.partial(_outputs_of, model, strategy),
    )
    with worker_errors(), program as outputs_of:
        pieces = _pieces(
            model,
            batches,
            dataset,
            outputs_of,
            keras.callbacks.CallbackList(
                swapped_averages.followed(
                    hooks.callbacks_here(callbacks, strategy), model
                ),
                model=model,
                epochs=1,
                steps=batches.steps or batches.count,
                verbose=1 if verbose == "auto" else verbose,
            ),
        )
        part(strategy)
    if not pieces:
        raise InputError("The dataset ended before the first batch.")
    if verbose and is_chief(strategy):
        print(f"predicted {len(pieces)} batches", flush=True)
    return _joined(pieces)


def _joined(pieces: list[Any]) -> Any:
    """The outputs of batches, one after the other."""
    return keras.tree.map_structure_up_to(
        pieces[0],
        lambda *outputs: keras_internals.concatenate_outputs(list(outputs)),
        *pieces,
    )


def _pieces(
    model: keras.Model,
    batches: Batches,
    dataset: tf.data.Dataset,
    outputs_of: Callable[[Any], Any],
    callbacks: keras.callbacks.CallbackList,
) -> list[Any]:
    """The outputs of each batch, whole."""
    strategy = model.distribute_strategy
    pieces: list[Any] = []
    limit = batches.steps or batches.count
    model.stop_predicting = False
    callbacks.on_predict_begin()
    batches.begin_epoch()
    shares = iter(distribute_batches(strategy, dataset))
    share = next(shares, None)
    while share is not None and len(pieces) != limit:
        begin = len(pieces)
        callbacks.on_predict_batch_begin(begin)
        end = begin + model.steps_per_execution
        end = end if limit is None else min(end, limit)
        while share is not None and len(pieces) < end:
            pieces.append(outputs_of(share))
            share = None if len(pieces) == limit else next(shares, None)
        last = keras_internals.last_of_execution(model, begin, len(pieces))
        outputs = pieces[-1]
        if len(pieces) > begin + 1:
            outputs = _joined(pieces[begin:])
        callbacks.on_predict_batch_end(last, {"outputs": outputs})
        if model.stop_predicting:
            break
    batches.end_epoch()
    callbacks.on_predict_end()
    return pieces


def _outputs_of(
    model: keras.Model,
    strategy: tf.distribute.Strategy,
    on_trace: Callable[[], None],
) -> Callable[[Any], Any]:
    """A function from shares to the outputs of the whole batch, in order."""
    is_traced = False

    @tf.autograph.experimental.do_not_convert
    def step(share) -> tuple[Any, tf.Tensor]:
        outputs = model.predict_step(share.data["batch"])
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        place = tf.stack([tf.cast(replica, tf.int64), share.rows])
        return keras.tree.map_structure(_in_float32, outputs), place[None]

    @tf.autograph.experimental.do_not_convert
    def run(share):
        nonlocal is_traced
        is_traced = True
        with tensorflow_internals.differentiated_within():
            outputs, places = strategy.run(step, args=(share,))
        if is_multi_worker(strategy):
            # One by one: together they would have to be of one dtype.
            return keras.tree.map_structure(
                lambda rows: reduction.gather_rows(strategy, rows),
                (outputs, places),
            )
        return outputs, places

    if not model.run_eagerly:
        run = tensorflow_internals.graph_function(run, relaxes=True)

    def outputs_of(share) -> Any:
        nonlocal is_traced
        outputs, places = run(share)
        if is_traced and not model.run_eagerly:
            is_traced = False
            on_trace()
        local = strategy.experimental_local_results
        return keras.tree.map_structure(
            lambda values: _whole(local(values), np.concatenate(local(places))),
            outputs,
        )

    return outputs_of


def _in_float32(output: Any) -> Any:
    if output.dtype in (tf.float16, tf.bfloat16):
        return tf.cast(output, tf.float32)
    return output


def _whole(pieces: tuple[Any, ...], places: np.ndarray) -> Any:
    """One output of the replicas, put together in the order of the rows.

    Args:
        pieces: of each replica, or one that all workers' were gathered in.
        places: of each replica, its index and how many of its rows count.
    """
    if len(places) == 1:
        return pieces[0]
    if len(pieces) == 1:
        # A share without rows has one that does not count.
        pieces = tf.split(pieces[0], np.maximum(places[:, 1], 1))
    counting = [
        pieces[position]
        for position in np.argsort(places[:, 0])
        if places[position, 1]
    ]
    if isinstance(counting[0], tf.SparseTensor):
        return tf.sparse.concat(0, counting)
    if counting[0].shape.rank == 0:
        return tf.stack(counting)
    return tf.concat(counting, axis=0)
