"""State that TensorFlow holds beside Keras's variables.

A layer may keep a `tf.Variable` or a `tf.random.Generator`, which Keras does
not list; and operations of `tf.random` keep their state where nobody gets at
it, so that they can only be named.
"""

import re
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfamp import keras_internals, tensorflow_internals
from tfamp.checkpoint.plain_values import decode, encode

_GLOBAL = "tf.random.get_global_generator()"
# Kernels that draw from a state of their own.
_DRAWING = re.compile(
    r"Random(StandardNormal|Uniform|UniformInt|Shuffle|Gamma|Poisson\w*|Crop)"
    r"|(Parameterized)?TruncatedNormal|Multinomial|\w*CandidateSampler"
)


def capture(model: keras.Model, arrays: list[np.ndarray]) -> dict[str, Any]:
    """Their values on this host, by path; the arrays are added to `arrays`."""
    return {
        path: encode([part.numpy() for part in parts], arrays)
        for path, parts in _parts(model).items()
    }


def restore(
    model: keras.Model, saved: dict[str, Any], arrays: list[np.ndarray]
) -> None:
    """Gives them what `capture` returned, where they are here too."""
    if _GLOBAL in saved and tensorflow_internals.global_generator() is None:
        # With any seed: the state follows.
        tf.random.set_global_generator(tf.random.Generator.from_seed(0))
    parts = _parts(model)
    for path, encoded in saved.items():
        values = decode(encoded, arrays)
        here = parts.get(path, [])
        if len(values) == len(here):
            for part, value in zip(here, values, strict=True):
                part.assign(value)


def warn_of_draws(graph: tf.Graph, model: keras.Model) -> None:
    """Names what draws in a step from a state that cannot be saved."""
    where = _drawing_nodes(graph)
    if not where:
        return
    names = {layer.name for layer in keras_internals.all_layers(model)}
    layers = dict.fromkeys(_layer_of(node, names) for node in where)
    logging.warning(
        "%s from tf.random, whose state no checkpoint can hold: a run that "
        "goes on draws other numbers. keras.random with a "
        "keras.random.SeedGenerator goes on.",
        "What is drawn is"
        if None in layers
        else f"Layer {', '.join(map(str, layers))} draws",
    )


def _drawing_nodes(graph: tf.Graph) -> list[str]:
    definition = graph.as_graph_def()
    functions = [
        node for each in definition.library.function for node in each.node_def
    ]
    return [
        node.name
        for node in [*definition.node, *functions]
        if _DRAWING.fullmatch(node.op)
    ]


def _layer_of(node: str, names: set[str]) -> str | None:
    """The innermost layer in whose scope a node was made."""
    for part in reversed(node.split("/")[:-1]):
        # A name that is there already gets a number.
        for name in (part, re.sub(r"_\d+$", "", part)):
            if name in names:
                return name
    return None


def _parts(model: keras.Model) -> dict[str, list[tf.Variable]]:
    """By path: a variable for each replica of this host."""
    known = {
        id(keras_internals.stored(variable))
        for variable in [*model.variables, *model.metrics_variables]
    }
    found: dict[str, tf.Variable] = {}
    # By their place: Keras numbers names by how many there were before.
    for place, layer in enumerate(keras_internals.all_layers(model)):
        for name, value in vars(layer).items():
            # TensorFlow's own list of what it tracks.
            if name.startswith("_self_"):
                continue
            for end, variable in _variables_in(value, known):
                found[f"{place}/{name}{end}"] = variable
    generator = tensorflow_internals.global_generator()
    if generator is not None:
        found[_GLOBAL] = generator.state
    strategy = model.distribute_strategy
    return {
        path: list(strategy.experimental_local_results(variable))
        for path, variable in found.items()
    }


def _variables_in(value: Any, known: set[int]) -> list[tuple[str, tf.Variable]]:
    if isinstance(value, tf.Variable):
        if id(value) in known:
            return []
        known.add(id(value))
        return [("", value)]
    if isinstance(value, tf.random.Generator):
        return _variables_in(value.state, known)
    if isinstance(value, (list, tuple)):
        items: Any = enumerate(value)
    elif isinstance(value, dict):
        items = value.items()
    else:
        return []
    return [
        (f"/{key}{end}", variable)
        for key, each in items
        if not isinstance(each, (list, tuple, dict))
        for end, variable in _variables_in(each, known)
    ]
