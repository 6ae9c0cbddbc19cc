"""A training step of a model's own as a graph, traced and never run."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.analysis.lint.graph import Graph, Node
from tfamp.analysis.lint.scratch import (
    NotTraced,
    first_line,
    marked,
    placeholder,
    scopes_of,
    scratch_graph,
    tensors_of,
    untouched,
)
from tfamp.analysis.lint.source import line_of
from tfamp.precision.layer_paths import Place


@dataclasses.dataclass(frozen=True)
class OptimizerUse:
    """What a training step did with one optimizer.

    Attributes:
        loss_dtypes: of the losses that it scaled.
        gradients: what it was to apply, without those that are None.
        scales: what stands for its scale in the graph.
        scaled_losses: what `scale_loss` returned.
    """

    loss_dtypes: tuple[str, ...]
    gradients: tuple[Node, ...]
    scales: tuple[Node, ...]
    scaled_losses: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """A `train_step` of the model's own.

    Attributes:
        graph: the operations, backward pass included.
        uses: by the optimizers' ids.
        divided: what Keras made ready to add up over replicas.
        inputs: the batch.
    """

    graph: Graph
    uses: dict[int, OptimizerUse]
    divided: tuple[Node, ...] = ()
    inputs: tuple[Node, ...] = ()


def trace_step(
    model: keras.Model,
    places: Sequence[Place],
    batch: Any,
    optimizers: Sequence[keras.optimizers.Optimizer],
) -> StepTrace:
    """Traces `model.train_step`, with optimizers that apply nothing.

    Args:
        model: built and compiled.
        places: all its layers.
        batch: what `train_step` is called with, for shapes and dtypes only.
        optimizers: those that the step may use.

    Raises:
        NotTraced: the step cannot be called on placeholders.
    """
    scopes = scopes_of(places)
    with untouched(model, places), scratch_graph() as graph:
        data = keras.tree.map_structure(placeholder, batch)
        divided: list[tf.Tensor] = []
        with (
            keras_internals.loss_and_metrics_unbuilt(model),
            marked(model, places, []),
            noted(optimizers) as notes,
            keras_internals.divisions_noted(divided),
        ):
            try:
                logs = model.train_step(data)
            # The model's own code runs here, and may raise anything.
            except Exception as error:
                raise NotTraced(first_line(error)) from error
        definition = graph.as_graph_def(add_shapes=True)
        lines = {each.name: line_of(each) for each in graph.get_operations()}
        read = Graph(definition, scopes, lines=lines)
        uses = {
            id(each): _use(each, note, graph, read)
            for each, note in zip(optimizers, notes, strict=True)
        }
        divisions = tuple(map(read.node_of, tensors_of(divided, graph)))
        inputs = tuple(map(read.node_of, tensors_of(data, graph)))
        ends = tensors_of(logs, graph)
        for note in notes:
            ends += tensors_of((note.gradients, note.scaled_losses), graph)
        if ends:
            read.keep_alive(map(read.node_of, ends), ())
    return StepTrace(read, uses, divisions, inputs)


@dataclasses.dataclass(frozen=True)
class Notes:
    """What an optimizer was given while a step was traced."""

    loss_dtypes: list[str]
    gradients: list[tf.Tensor]
    factors: list[tf.Tensor]
    scaled_losses: list[tf.Tensor]


@contextlib.contextmanager
def noted(optimizers) -> Iterator[list[Notes]]:
    """Within it, the optimizers note what they are given, and apply nothing."""
    notes = [Notes([], [], [], []) for _ in optimizers]
    for optimizer, note in zip(optimizers, notes, strict=True):
        scale_loss = _noting_scale(optimizer.scale_loss, note)
        # Past Optimizer.__setattr__, which tracks what it is given.
        object.__setattr__(optimizer, "scale_loss", scale_loss)
        object.__setattr__(optimizer, "apply", _noting_gradients(note))
    try:
        yield notes
    finally:
        for optimizer in optimizers:
            object.__delattr__(optimizer, "scale_loss")
            object.__delattr__(optimizer, "apply")


def _noting_scale(original: Callable, note: Notes) -> Callable:
    def scale_loss(loss):
        note.loss_dtypes.append(keras.backend.standardize_dtype(loss.dtype))
        scaled = tf.convert_to_tensor(original(loss))
        # Whatever is multiplied by this was scaled by this optimizer.
        note.factors.append(tf.compat.v1.placeholder(scaled.dtype, ()))
        note.scaled_losses.append(scaled * note.factors[-1])
        return note.scaled_losses[-1]

    return scale_loss


def _noting_gradients(note: Notes) -> Callable:
    def apply(grads, trainable_variables=None):
        for each in grads:
            each = each.values if isinstance(each, tf.IndexedSlices) else each
            if each is not None:
                note.gradients.append(each)

    return apply


def _use(optimizer, note: Notes, graph, read: Graph) -> OptimizerUse:
    scales = [*note.factors, *_reads_of_scale(optimizer, graph)]
    return OptimizerUse(
        tuple(note.loss_dtypes),
        tuple(map(read.node_of, tensors_of(note.gradients, graph))),
        tuple(map(read.node_of, tensors_of(scales, graph))),
        tuple(map(read.node_of, tensors_of(note.scaled_losses, graph))),
    )


def _reads_of_scale(optimizer, graph) -> list[tf.Tensor]:
    """Where the graph takes in the scale's variable, for scaling by hand."""
    scale = getattr(optimizer, "dynamic_scale", None)
    if scale is None:
        return []
    # A mirrored variable is several.
    handles = [each.handle for each in getattr(scale.value, "values", ())]
    handles = handles or [scale.value.handle]
    return [
        inner
        for outer, inner in graph.captures
        if any(outer is handle for handle in handles)
    ]
