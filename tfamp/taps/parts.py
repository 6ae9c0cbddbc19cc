"""Taps on a model: a function sees what goes into its parts and comes out.

The function counts, sizes or compares; it gets a tensor and the spot where it
passes, and gives back what goes on from there, which is how it sees a gradient
too: see `passing.with_gradient_seen`.

A part is a layer, an operation of a functional model, or whatever else has a
method to stand in the way of: a single function of a module is one as well.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import keras
import tensorflow as tf

from tfamp.precision.layer_paths import walk
from tfamp.taps.gates import gate
from tfamp.taps.passing import graph_now, map_floats


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What is tapped. Two parts are the same if they are one object.

    Attributes:
        owner: the layer or the operation itself.
        path: which it is, in words; no other part of the model has it.
        method: what is called when it computes.
    """

    owner: Any
    path: str
    method: str = "call"


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where a tensor passes.

    Attributes:
        part: what it goes into or comes out of.
        side: "input" or "output".
        index: its place among all that goes in, or comes out.
        count: how many these are.
    """

    part: Part
    side: Literal["input", "output"]
    index: int
    count: int


See = Callable[[Spot, tf.Tensor], tf.Tensor]


class Taps:
    """Taps on the parts of a model; each replica is traced in its own thread.

    Args:
        parts: where they are.
    """

    def __init__(self, parts: Sequence[Part]):
        self._parts = parts
        self._thread = threading.local()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, what the parts compute goes through the taps."""
        with contextlib.ExitStack() as stack:
            for part in self._parts:
                around = functools.partial(self._around, part)
                stack.enter_context(gate(part.owner, part.method, around))
            yield

    @contextlib.contextmanager
    def watching(
        self, see: See, miss: Callable[[Part], None] = lambda part: None
    ) -> Iterator[None]:
        """Within it, this thread's tensors are seen; other threads' are not.

        Args:
            see: gets each floating tensor, and gives what goes on.
            miss: gets each part that computes in an inner graph (a step of a
                recurrent layer, a branch of a condition): tensors cannot leave
                that, and are not seen.
        """
        before = self._now
        self._thread.now = (see, miss, graph_now())
        try:
            yield
        finally:
            self._thread.now = before

    @property
    def _now(self) -> tuple[See, Callable[[Part], None], Any] | None:
        return getattr(self._thread, "now", None)

    def _around(self, part: Part, call, /, *args, **kwargs):
        if self._now is None:
            return call(*args, **kwargs)
        see, miss, graph = self._now
        if graph is not graph_now():
            miss(part)
            return call(*args, **kwargs)
        args, kwargs = map_floats(
            lambda i, count, value: see(Spot(part, "input", i, count), value),
            (args, kwargs),
        )
        return map_floats(
            lambda i, count, value: see(Spot(part, "output", i, count), value),
            call(*args, **kwargs),
        )


def layers_of(model: keras.Model) -> list[Part]:
    """All layers in a model, each once, outer before inner."""
    return [
        Part(place.layer, place.path, _method_of(place.layer))
        for place in walk(model)
    ]


def operations_of(model: keras.Model) -> list[Part]:
    """What functional models compute without a layer, each operation once."""
    models = [("", model)]
    models += [(f"{part.path}/", part.owner) for part in layers_of(model)]
    found: dict[int, Part] = {}
    for prefix, each in models:
        # Models that are no graph of operations have no such list.
        for operation in getattr(each, "operations", ()):
            if not isinstance(operation, keras.layers.Layer):
                # Models that are made of each other's tensors share them.
                found.setdefault(
                    id(operation),
                    Part(operation, f"{prefix}{operation.name}"),
                )
    return list(found.values())


def _method_of(layer: keras.layers.Layer) -> str:
    return "quantized_call" if layer.quantization_mode else "call"
