"""A traced graph as lint reads it: operations, dtypes, and who feeds whom.

It is read from the `GraphDef`, which is public, and in which functions
(`tf.function`, `tf.cond`, `tf.while_loop`) are put in the place of their calls:
a softmax is found wherever it is.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfamp.analysis.lint.ops import RESHAPES

Shape = tuple[int | None, ...]

_BACKWARD = "gradient_tape"
# Their first input is what they decide by, and no function gets it.
_DECIDING = ("Case", "If", "StatelessCase", "StatelessIf")
_DTYPE_ATTRIBUTES = ("DstT", "T", "dtype", "Tout")


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        name: unique in the graph.
        op: its TensorFlow type; "Argument" and "Result" where a function
            begins and ends.
        dtype: of its result, "" where it has none.
        place: where the operation was written: a layer's path, or another
            name that the graph was made with.
        is_backward: whether it belongs to a gradient.
        inputs: the names of the nodes that feed it, and which output of each.
        shapes: of its outputs; None where the rank is unknown.
        value: a constant's.
        line: "file.py:12", where own code made it, or "".
    """

    name: str
    op: str
    dtype: str
    place: str
    is_backward: bool
    inputs: tuple[tuple[str, int], ...]
    shapes: tuple[Shape | None, ...] = ()
    value: np.ndarray | None = None
    line: str = ""


class Graph:
    """All operations of a traced graph, by name, in the order of tracing.

    Args:
        definition: with shapes, as `as_graph_def(add_shapes=True)` makes it.
        places: name scope to the place that it stands for. An operation is
            where its outermost scope is; one with no such scope is at the
            place of the call of its function, or at "".
        dropped: name scopes whose operations are left out.
        lines: where own code made operations, by their name. What a function
            holds is where it is called.
    """

    def __init__(
        self,
        definition: Any,
        places: Mapping[str, str],
        dropped: Sequence[str] = (),
        lines: Mapping[str, str] | None = None,
    ):
        self._lines = lines or {}
        self._live: set[str] | None = None
        self._places = places
        self._dropped = dropped
        self._functions = {
            function.signature.name: function
            for function in definition.library.function
        }
        self.nodes: dict[str, Node] = {}
        self._outer_line = ""
        self._add_all(definition.node, "", "", False, {})
        self._consumers: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            for source, _ in node.inputs:
                self._consumers.setdefault(source, []).append(node)

    def keep_alive(self, ends: Iterable[Node], places: Sequence[str]) -> None:
        """Forgets in `forward` what nothing comes of.

        Args:
            ends: what the graph is run for.
            places: where all is alive.
        """
        ends = [
            *ends,
            *(node for node in self.nodes.values() if node.place in places),
        ]
        reached = self.upstream(ends, lambda node: True)
        self._live = {node.name for node in reached}

    def forward(self) -> Iterator[Node]:
        """The operations that belong to no gradient, and come to something."""
        return (
            node
            for node in self.nodes.values()
            if not node.is_backward
            and (self._live is None or node.name in self._live)
        )

    def node_of(self, tensor: tf.Tensor) -> Node:
        """The node that computed a tensor of the traced graph."""
        name, _, index = tensor.name.rpartition(":")
        return self.nodes[self._resolve(name, int(index))[0]]

    def sources(self, node: Node) -> list[Node]:
        """The nodes that feed this one, in the order of its inputs."""
        return [self.nodes[name] for name, _ in node.inputs]

    def consumers(self, node: Node) -> list[Node]:
        """The nodes that this one feeds."""
        return self._consumers.get(node.name, [])

    def upstream(
        self, starts: Iterable[Node], passes: Callable[[Node], bool]
    ) -> Iterator[Node]:
        """The nodes from `starts` towards the inputs, each once.

        Goes on behind a node for which `passes` holds.
        """
        return self._reach(starts, passes, self.sources)

    def downstream(
        self, starts: Iterable[Node], passes: Callable[[Node], bool]
    ) -> Iterator[Node]:
        """The nodes from `starts` towards the outputs, each once."""
        return self._reach(starts, passes, self.consumers)

    def constant(self, node: Node) -> np.ndarray | None:
        """The value of a constant, also a reshaped one; None for others."""
        while node.value is None:
            sources = self.sources(node)
            if node.op not in RESHAPES or not sources:
                return None
            node = sources[0]
        return node.value

    def input_shape(self, node: Node, position: int) -> Shape | None:
        """The shape of one of a node's inputs; None where it is unknown."""
        name, index = node.inputs[position]
        shapes = self.nodes[name].shapes
        return shapes[index] if index < len(shapes) else None

    def _reach(self, starts, passes, neighbors) -> Iterator[Node]:
        pending, seen = list(starts), set()
        while pending:
            node = pending.pop()
            if node.name in seen:
                continue
            seen.add(node.name)
            yield node
            if passes(node):
                pending.extend(neighbors(node))

    def _add_all(
        self, definitions, prefix, outer_place, is_backward, arguments
    ) -> None:
        for each in definitions:
            first = each.name.partition("/")[0]
            if first in self._dropped:
                continue
            place = self._places.get(first, outer_place)
            self._add(
                each,
                prefix,
                place,
                is_backward or first == _BACKWARD,
                arguments,
            )

    def _add(self, definition, prefix, place, is_backward, arguments) -> None:
        feeding = []
        for text in definition.input:
            if text.startswith("^"):
                continue
            parts = text.split(":")
            index = int(parts[-1]) if len(parts) > 1 else 0
            name = arguments.get(parts[0], f"{prefix}{parts[0]}")
            feeding.append(self._resolve(name, index))
        # What fed it may have been left out.
        inputs = tuple(each for each in feeding if each[0] in self.nodes)
        name = f"{prefix}{definition.name}"
        attributes = definition.attr
        value = None
        if definition.op == "Const":
            value = tf.make_ndarray(attributes["value"].tensor)
        self.nodes[name] = Node(
            name,
            definition.op,
            _dtype(attributes),
            place,
            is_backward,
            inputs,
            tuple(map(_shape, attributes["_output_shapes"].list.shape)),
            value,
            self._lines.get(name, self._outer_line),
        )
        outer_line, self._outer_line = (
            self._outer_line,
            self.nodes[name].line,
        )
        results: dict[int, list[tuple[str, int]]] = {}
        for function in self._called(definition):
            for index, end in enumerate(
                self._add_function(function, definition.op, self.nodes[name])
            ):
                results.setdefault(index, []).append(end)
        self._outer_line = outer_line
        for index, ends in results.items():
            source = self.nodes[ends[0][0]]
            result = f"{name}#{index}"
            shapes = self.nodes[name].shapes[index : index + 1]
            self.nodes[result] = Node(
                result,
                "Result",
                source.dtype,
                place,
                is_backward,
                tuple(ends),
                shapes,
            )

    def _add_function(
        self, function, op, call: Node
    ) -> Iterator[tuple[str, int]]:
        """Puts a function in the place of a call; yields what it returns."""
        prefix = f"{call.name}/{function.signature.name}/"
        given = call.inputs[1:] if op in _DECIDING else call.inputs
        arguments = {}
        # An operand may be missing where it was left out.
        for position, argument in enumerate(function.signature.input_arg):
            source = given[position : position + 1]
            name = f"{prefix}{argument.name}"
            arguments[argument.name] = name
            shapes: tuple[Shape | None, ...] = ()
            if source:
                feeding = self.nodes[source[0][0]]
                shapes = feeding.shapes[source[0][1] : source[0][1] + 1]
            self.nodes[name] = Node(
                name,
                "Argument",
                tf.dtypes.as_dtype(argument.type).name,
                call.place,
                call.is_backward,
                tuple(source),
                shapes,
            )
        self._add_all(
            _in_order(function.node_def),
            prefix,
            call.place,
            call.is_backward,
            arguments,
        )
        for output in function.signature.output_arg:
            parts = function.ret[output.name].split(":")
            name = arguments.get(parts[0], f"{prefix}{parts[0]}")
            index = int(parts[-1]) if len(parts) > 1 else 0
            resolved = self._resolve(name, index)
            if resolved[0] in self.nodes:
                yield resolved

    def _called(self, definition) -> list:
        names = []
        for key, attribute in definition.attr.items():
            # The condition of a loop computes nothing that is trained on.
            if definition.op in ("While", "StatelessWhile") and key == "cond":
                continue
            names.append(attribute.func.name)
            names.extend(each.name for each in attribute.list.func)
        return [
            self._functions[name] for name in names if name in self._functions
        ]

    def _resolve(self, name: str, index: int) -> tuple[str, int]:
        # A call's result of that number is a node of its own.
        result = f"{name}#{index}"
        return (result, 0) if result in self.nodes else (name, index)


def _in_order(definitions) -> list:
    """A function's nodes, each after those that feed it."""
    by_name = {each.name: each for each in definitions}
    ordered: dict[str, Any] = {}
    for definition in definitions:
        pending = [definition]
        while pending:
            each = pending[-1]
            missing = [
                by_name[name]
                for name in (_source_name(text) for text in each.input)
                if name in by_name and name not in ordered
            ]
            if missing:
                pending.extend(missing)
            else:
                ordered[each.name] = pending.pop()
    return list(ordered.values())


def _source_name(text: str) -> str:
    return text.removeprefix("^").partition(":")[0]


def _dtype(attributes) -> str:
    for key in _DTYPE_ATTRIBUTES:
        if key in attributes and attributes[key].type:
            return tf.dtypes.as_dtype(attributes[key].type).name
    return ""


def _shape(shape) -> Shape | None:
    if shape.unknown_rank:
        return None
    return tuple(None if d.size < 0 else d.size for d in shape.dim)
