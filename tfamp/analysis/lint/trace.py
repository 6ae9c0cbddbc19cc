"""A model's forward pass, its loss and metrics as a graph: never run."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.analysis.lint.graph import Graph, Node
from tfamp.analysis.lint.scratch import (
    SCOPE,
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
from tfamp.errors import InputError
from tfamp.precision import output_layers
from tfamp.precision.layer_paths import Place

# Places that are no layer. A layer's name holds no such characters.
LOSS = "<loss>"
METRICS = "<metrics>"


@dataclasses.dataclass(frozen=True)
class AddedLoss:
    """A loss that a layer gave to `add_loss`."""

    layer: str
    dtype: str
    node: Node


@dataclasses.dataclass(frozen=True)
class ForwardTrace:
    """The forward pass, and where the model is compiled loss and metrics.

    Attributes:
        graph: the operations; their places are paths of layers, `LOSS` and
            `METRICS`.
        inputs: what the model was given, flat.
        outputs: what it returned, flat.
        added_losses: of `add_loss`.
        loss: what `compute_loss` returned, None where it was not traced.
        untraced: why it was not, None where nothing failed.
    """

    graph: Graph
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    added_losses: tuple[AddedLoss, ...]
    loss: Node | None
    untraced: str | None


def trace_forward(
    model: keras.Model, places: Sequence[Place], batch: Any, training: bool
) -> ForwardTrace:
    """Traces a call of the model and, in training, its loss and metrics.

    Args:
        model: built.
        places: all its layers.
        batch: `(x, y, sample_weight)` or less of them, for shapes and dtypes
            only; None for those that the model was built with, and for any
            labels with which loss and metrics can be traced.
        training: what the model is called with.

    Raises:
        NotTraced: the model cannot be called on placeholders.
    """
    problem = NotTraced("the shapes of its input are not known; pass a batch")
    for call in _calls(model, batch):
        try:
            return _trace_forward(model, places, batch, call, training)
        except NotTraced as error:
            problem = error
    raise problem


def _trace_forward(model, places, batch, call, training) -> ForwardTrace:
    added: list[tuple[str, tf.Tensor]] = []
    loss, untraced = None, None
    scopes, failed = scopes_of(places), []
    with untouched(model, places), scratch_graph() as graph:
        args, kwargs = keras.tree.map_structure(placeholder, call)
        with marked(model, places, added):
            try:
                outputs = model(*args, **kwargs, training=training)
            # The model's own code runs here, and may raise anything.
            except Exception as error:
                raise NotTraced(first_line(error)) from error
            if training and model.compiled:
                x = args[0] if args else kwargs
                loss, untraced, failed = _trace_loss(
                    model, x, outputs, batch, scopes
                )
        read = Graph(
            graph.as_graph_def(add_shapes=True),
            scopes,
            failed,
            {each.name: line_of(each) for each in graph.get_operations()},
        )
        alive = tensors_of((outputs, loss, [each for _, each in added]), graph)
        read.keep_alive(map(read.node_of, alive), (METRICS,))
        return ForwardTrace(
            read,
            tuple(map(read.node_of, tensors_of((args, kwargs), graph))),
            tuple(map(read.node_of, tensors_of(outputs, graph))),
            tuple(
                AddedLoss(path, each.dtype.name, read.node_of(each))
                for path, each in added
                if each.graph is graph
            ),
            next(map(read.node_of, tensors_of([loss], graph)), None),
            untraced,
        )


def _trace_loss(model, x, outputs, batch, scopes):
    """Traces loss and metrics with the labels, or the first that will do.

    Returns:
        The loss; why there is none, or None; the scopes of what failed. Those
        of what did not are added to `scopes`.
    """
    problem, failed = None, []
    for number, (y, sample_weight) in enumerate(_labels(outputs, batch)):
        # Names of their own: what failed has left operations behind.
        names = [f"{SCOPE}loss{number}", f"{SCOPE}metrics{number}"]
        try:
            with keras_internals.loss_and_metrics_unbuilt(model):
                with tf.name_scope(f"{names[0]}/"):
                    loss = model.compute_loss(
                        x=x, y=y, y_pred=outputs, sample_weight=sample_weight
                    )
                with tf.name_scope(f"{names[1]}/"):
                    model.compute_metrics(
                        x, y, outputs, sample_weight=sample_weight
                    )
        except Exception as error:
            problem = problem or first_line(error)
            failed.extend(names)
        else:
            scopes.update(zip(names, (LOSS, METRICS), strict=True))
            return loss, None, failed
    return None, problem, failed


def _labels(outputs, batch) -> Iterator[tuple[Any, Any]]:
    """Labels and sample weights to try, on placeholders."""
    if batch is not None:
        _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        yield keras.tree.map_structure(placeholder, (y, sample_weight))
        return

    for dtype, shape_of in (
        ("float32", lambda shape: shape),
        ("int32", lambda shape: shape[:-1]),
        ("int32", lambda shape: [*shape[:-1], 1]),
    ):

        def label(output, dtype=dtype, shape_of=shape_of):
            if not isinstance(output, tf.Tensor) or output.shape.rank is None:
                return None
            shape = shape_of(output.shape.as_list())
            return tf.compat.v1.placeholder(dtype, shape)

        yield keras.tree.map_structure(label, outputs), None


def _calls(model, batch) -> list[tuple[tuple, dict]]:
    if batch is not None:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        return [((x,), {})]
    try:
        return output_layers.placeholders(model)
    except InputError:
        return []
