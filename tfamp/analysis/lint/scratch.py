"""Where lint traces: in a graph that nothing runs, and that leaves no mark.

The model, its variables and all random states are afterwards what they were:
Keras notes the updates of variables there, and does not make them.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.checkpoint.random_state import get_random_state, set_random_state

# How name scopes begin that stand for places.
SCOPE = "tfamp."


class NotTraced(Exception):
    """The model's own code failed on placeholders; says how."""


@contextlib.contextmanager
def untouched(model, places) -> Iterator[None]:
    """Gives back all that tracing moves and a graph does not hold."""
    random_state = get_random_state()
    layers = [model, *(place.layer for place in places)]
    try:
        with (
            keras_internals.build_state_kept(layers),
            keras_internals.additional_losses_kept(layers),
            # As tfamp.fit does: else Keras fails at one of 16 bits, before
            # lint has seen the rest.
            keras_internals.additional_losses_in_float32(model),
            warnings.catch_warnings(),
        ):
            # NumPy warns of the -1e9 that becomes -inf; the finding tells it.
            warnings.simplefilter("ignore")
            yield
    finally:
        if random_state["keras"] is None:
            keras_internals.forget_global_seed_generator()
        set_random_state(random_state)


@contextlib.contextmanager
def scratch_graph() -> Iterator[tf.Graph]:
    with (
        keras.StatelessScope(collect_losses=True),
        keras.SymbolicScope(),
        tf.__internal__.FuncGraph("tfamp_lint").as_default() as graph,
    ):
        yield graph


def scopes_of(places) -> dict[str, str]:
    """Name scope to the path of a layer; the model's own first."""
    paths = ["", *(place.path for place in places)]
    return {f"{SCOPE}{number}": path for number, path in enumerate(paths)}


@contextlib.contextmanager
def marked(model, places, added) -> Iterator[None]:
    """Within it, each layer's operations are in a name scope of its own."""
    layers = [model, *(place.layer for place in places)]
    replaced = []
    try:
        for layer, (scope, path) in zip(
            layers, scopes_of(places).items(), strict=True
        ):
            substitutes = {
                method: _scoped(scope, getattr(layer, method))
                for method in ("call", "quantized_call")
            }
            substitutes["add_loss"] = _noting_loss(path, layer.add_loss, added)
            # Past Layer.__setattr__, which tracks what it is given.
            for name, function in substitutes.items():
                replaced.append((vars(layer), name, vars(layer).get(name)))
                vars(layer)[name] = function
        yield
    finally:
        for attributes, name, former in replaced:
            if former is None:
                del attributes[name]
            else:
                attributes[name] = former


def _scoped(scope: str, function: Callable) -> Callable:
    def call(*args, **kwargs):
        # The slash makes it absolute: the innermost layer has the operation.
        with tf.name_scope(f"{scope}/"):
            return function(*args, **kwargs)

    return call


def _noting_loss(path: str, add_loss: Callable, added) -> Callable:
    def call(loss):
        added.extend(
            (path, each)
            for each in keras.tree.flatten(loss)
            if isinstance(each, tf.Tensor)
        )
        return add_loss(loss)

    return call


def placeholder(leaf):
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return leaf
    if isinstance(leaf, tf.__internal__.CompositeTensor):
        raise NotTraced(f"its input is a {type(leaf).__name__}")
    return tf.compat.v1.placeholder(
        tf.dtypes.as_dtype(leaf.dtype), tuple(leaf.shape)
    )


def tensors_of(structure, graph) -> list[tf.Tensor]:
    return [
        leaf
        for leaf in keras.tree.flatten(structure)
        if isinstance(leaf, tf.Tensor) and getattr(leaf, "graph", 0) is graph
    ]


def first_line(error: Exception) -> str:
    """An error in one line."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    # Keras says first where it was, and then what.
    return f"{type(error).__name__}: {' '.join(lines[:2])}"
