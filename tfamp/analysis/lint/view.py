"""All that lint's rules look at: a model's layers, optimizers and graphs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras

from tfamp import keras_internals
from tfamp.analysis.lint.findings import DTYPES_16
from tfamp.analysis.lint.graph import Graph, Node
from tfamp.analysis.lint.scratch import NotTraced
from tfamp.analysis.lint.step import StepTrace, trace_step
from tfamp.analysis.lint.trace import LOSS, METRICS, ForwardTrace, trace_forward
from tfamp.precision.layer_paths import Place, walk


@dataclasses.dataclass(frozen=True)
class View:
    """A model seen from outside.

    Attributes:
        model: built.
        places: all layers in it.
        batch: an element of the training data, or None.
        optimizers: of `compile`, and those that the model or a layer holds
            itself, as a GAN does.
        passes: the forward pass in training and in inference; none where it
            cannot be traced.
        step: the model's own `train_step`; None where it has none, or it
            cannot be traced.
        untraced: why what was not traced was not.
    """

    model: keras.Model
    places: tuple[Place, ...]
    batch: Any
    optimizers: tuple[keras.optimizers.Optimizer, ...]
    passes: tuple[ForwardTrace, ...]
    step: StepTrace | None
    untraced: tuple[str, ...]

    @property
    def replicas(self) -> int:
        return self.model.distribute_strategy.num_replicas_in_sync

    def graphs(self) -> Iterator[Graph]:
        """Everything that was traced."""
        yield from (each.graph for each in self.passes)
        if self.step is not None:
            yield self.step.graph

    def layer_at(self, path: str) -> keras.layers.Layer:
        """The layer with this path; the model for any other place."""
        for place in self.places:
            if place.path == path:
                return place.layer
        return self.model


def look(model: keras.Model, batch: Any) -> View:
    """Traces what can be traced of a built model."""
    places = tuple(walk(model))
    optimizers = tuple(_optimizers(model, places)) if model.compiled else ()
    passes, problems, step = [], [], None
    try:
        passes = [
            trace_forward(model, places, batch, training)
            for training in (True, False)
        ]
    except NotTraced as error:
        problems.append(f"its call: {error}")
    if has_own_step(model) and model.compiled:
        try:
            step = trace_step(
                model, places, _step_batch(batch, passes), optimizers
            )
        except NotTraced as error:
            problems.append(f"its train_step: {error}")
        else:
            # It calls what the model is made of, as a GAN without a `call`.
            problems.clear()
            # Keras makes one up where `compile` is given none.
            used = [
                each for each in optimizers if step.uses[id(each)].gradients
            ]
            optimizers = tuple(used) or optimizers
    elif passes and passes[0].untraced and model.loss is not None:
        problems.append(f"its loss and metrics: {passes[0].untraced}")
    return View(
        model, places, batch, optimizers, tuple(passes), step, tuple(problems)
    )


def has_own_step(model: keras.Model) -> bool:
    """Whether a model overrides `train_step`."""
    return type(model).train_step is not keras.Model.train_step


def is_16_bit(node: Node) -> bool:
    """Whether a node computes in 16 bits."""
    return node.dtype in DTYPES_16


def shown(place: str) -> str:
    """A place as findings name it: a layer's path, "" for what is none."""
    return "" if place in (LOSS, METRICS) else place


def unwrapped(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[keras.optimizers.Optimizer]:
    """An optimizer, and all that it wraps or holds, outermost first."""
    yield optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        yield from unwrapped(optimizer.inner_optimizer)
        return
    for each in getattr(optimizer, "optimizers", ()):
        yield from unwrapped(each)


def compiled_with(model: keras.Model, *names: str) -> list:
    """Flat, what `compile` was given for these arguments; none is None."""
    if not model.compiled:
        return []
    arguments = keras_internals.compile_arguments(model)
    return [
        leaf
        for name in names
        for leaf in keras.tree.flatten(arguments[name])
        if leaf is not None
    ]


def _optimizers(model, places) -> Iterator[keras.optimizers.Optimizer]:
    found = [model.optimizer]
    if has_own_step(model):
        for layer in (model, *(place.layer for place in places)):
            # A layer may train itself.
            for value in vars(layer).values():
                if isinstance(value, dict):
                    value = list(value.values())
                is_list = isinstance(value, (list, tuple))
                found.extend(value if is_list else [value])
    seen = set()
    for each in found:
        if isinstance(each, keras.optimizers.Optimizer):
            if id(each) not in seen:
                yield each
            seen.add(id(each))


def _step_batch(batch, passes) -> Any:
    if batch is not None:
        return batch
    if not passes:
        raise NotTraced("the shapes of its input are not known; pass a batch")
    raise NotTraced("what it is called with is not known; pass a batch")
