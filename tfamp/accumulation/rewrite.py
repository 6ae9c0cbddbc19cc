"""A traced graph whose 16-bit sums are made in float32.

It works on the serialized graph: there stand forward and backward passes,
whoever wrote the layers, and the bodies of loops, branches and compiled
functions. Nothing is replaced in Python, where other threads would see it.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import tensorflow as tf

from tfamp.accumulation.bias import product_with_ones
from tfamp.accumulation.trial import data_inputs
from tfamp.accumulation.trials import KERNELS

NARROW = {
    tf.float16.as_datatype_enum: "float16",
    tf.bfloat16.as_datatype_enum: "bfloat16",
}
_FLOAT32 = tf.float32.as_datatype_enum
_WIDE = (_FLOAT32, tf.float64.as_datatype_enum)

# Name, number format, device and whether XLA compiles it.
Judge = Callable[[str, str, str, bool], bool]

_rewrites = itertools.count()


@dataclass(frozen=True)
class _Place:
    """Where the nodes of a function run."""

    device: str
    jit: bool


def sums_in_float32(
    graph_def: tf.compat.v1.GraphDef, adds_in_16_bits: Judge, device: str
) -> Counter[str]:
    """Changes a graph so that what adds in 16 bits adds in float32.

    The results have the formats that they had: they are rounded once. A cast
    to a wider format that follows takes them unrounded.

    Args:
        graph_def: is changed. Its functions get new names, since theirs belong
            to functions that may still be in use.
        adds_in_16_bits: of a kernel's name, format, device and `jit`.
        device: "CPU" or "GPU": where nodes run that do not say where.

    Returns:
        How many nodes of each kernel were changed; of none, and the graph is
        as it was.
    """
    functions = {f.signature.name: f for f in graph_def.library.function}
    here = _Place(device, False)
    places = _places(graph_def, functions, here)
    changed = _widen(graph_def.node, "", "", {here}, adds_in_16_bits)
    for name, function in functions.items():
        where = places.get(name, {here})
        changed += _widen(
            function.node_def,
            ":{output}:0",
            ":y:0",
            where,
            adds_in_16_bits,
            function.ret,
        )
    if changed:
        rename_functions(graph_def, f"_float32_sums_{next(_rewrites)}")
    return changed


def _widen(
    nodes, kernel_output, cast_output, where, adds_in_16_bits, results=None
) -> Counter[str]:
    """Changes the nodes of one graph or function, in place.

    Args:
        nodes: repeated NodeDef.
        kernel_output: how others name the output of a node: by its position
            in graphs, by its name in functions.
        cast_output: the same of a Cast.
        where: the places in which the nodes run.
        adds_in_16_bits: what to change.
        results: of a function: the outputs of nodes that it returns.
    """
    changed: Counter[str] = Counter()
    rounded: dict[str, str] = {}
    all_nodes = []

    def cast(name, source, from_, to, like) -> str:
        node = tf.compat.v1.NodeDef(op="Cast", name=name, device=like.device)
        node.input.append(source)
        node.attr["SrcT"].type, node.attr["DstT"].type = from_, to
        all_nodes.append(node)
        return name + cast_output

    for node in nodes:
        narrow = node.attr["T"].type if "T" in node.attr else None
        name = kernel_of(node) if narrow in NARROW else None
        here = () if name is None else {_inside(place, node) for place in where}
        if name is None or not _adds_narrowly(
            name, narrow, here, adds_in_16_bits
        ):
            all_nodes.append(node)
            continue
        changed[name] += 1
        if (
            name == "BiasAddGrad"
            and node.attr["data_format"].s != b"NCHW"
            and not _adds_narrowly("MatMul", narrow, here, adds_in_16_bits)
        ):
            all_nodes += product_with_ones(node, kernel_output)
            continue
        kernel = KERNELS[name]
        positions: Iterable[int] = (
            range(len(data_inputs(node)))
            if kernel.inputs is None
            else kernel.inputs
        )
        for i in positions:
            wide = f"{node.name}/float32_{i}"
            node.input[i] = cast(wide, node.input[i], narrow, _FLOAT32, node)
        for each in kernel.types:
            node.attr[each].type = _FLOAT32
        node.attr.pop("_output_shapes", None)
        all_nodes.append(node)
        wide = node.name + kernel_output.format(output=kernel.output)
        rounded[wide] = cast(
            f"{node.name}/rounded", wide, _FLOAT32, narrow, node
        )
    if not changed:
        return changed
    makers = set(rounded.values())
    for node in all_nodes:
        if node.name + cast_output in makers:
            continue
        if (
            node.op == "Cast"
            and node.input[0] in rounded
            and node.attr["DstT"].type in _WIDE
        ):
            # What is wanted in float32 is not rounded on the way.
            node.attr["SrcT"].type = _FLOAT32
            continue
        for i, source in enumerate(node.input):
            node.input[i] = rounded.get(source, source)
    for key in results or {}:
        results[key] = rounded.get(results[key], results[key])
    copies = [
        tf.compat.v1.NodeDef.FromString(n.SerializeToString())
        for n in all_nodes
    ]
    del nodes[:]
    nodes.extend(copies)
    return changed


def _adds_narrowly(name, narrow, places, adds_in_16_bits) -> bool:
    return any(
        adds_in_16_bits(name, NARROW[narrow], place.device, place.jit)
        for place in places
    )


def kernel_of(node) -> str | None:
    """The name in `KERNELS`, of a node that may be one to change."""
    name = node.op
    if name == "Einsum" and _sums_alone(node.attr["equation"].s.decode()):
        name = "Einsum, a sum"
    return name if name in KERNELS and KERNELS[name].adds(node) else None


def _sums_alone(equation: str) -> bool:
    """Whether an index of one operand alone is not in the result."""
    operands, _, result = equation.partition("->")
    return any(
        letter not in result
        and letter not in ".,"
        and sum(letter in each for each in operands.split(",")) == 1
        for letter in operands
    )


def _inside(place: _Place, node) -> _Place:
    """Where a node runs, in a function that runs there."""
    device = tf.DeviceSpec.from_string(node.device).device_type
    jit = place.jit or _is_compiled(node)
    return _Place(device if device in ("CPU", "GPU") else place.device, jit)


def _is_compiled(holder) -> bool:
    return "_XlaMustCompile" in holder.attr and holder.attr["_XlaMustCompile"].b


def _places(graph_def, functions, here: _Place) -> dict[str, set[_Place]]:
    """Where each function runs, by the nodes that call it."""
    places: dict[str, set[_Place]] = {}
    pending = [(graph_def.node, here)]
    while pending:
        nodes, place = pending.pop()
        for node in nodes:
            for name in _called(node):
                if name not in functions:
                    continue
                inner = _inside(place, node)
                if _is_compiled(functions[name]):
                    inner = _Place(inner.device, True)
                if inner not in places.setdefault(name, set()):
                    places[name].add(inner)
                    pending.append((functions[name].node_def, inner))
    return places


def _called(node) -> Iterator[str]:
    """The functions that a node calls; its own operation may be one."""
    yield node.op
    for function in _function_values(node.attr):
        yield function.name


def _function_values(attributes) -> Iterator:
    for value in attributes.values():
        if value.HasField("func"):
            yield value.func
        yield from value.list.func


def rename_functions(graph_def, suffix: str) -> None:
    names = {f.signature.name for f in graph_def.library.function}

    def rename(nodes) -> None:
        for node in nodes:
            if node.op in names:
                node.op += suffix
            for value in _function_values(node.attr):
                if value.name in names:
                    value.name += suffix

    rename(graph_def.node)
    for function in graph_def.library.function:
        rename(function.node_def)
        function.signature.name += suffix
        for value in _function_values(function.attr):
            if value.name in names:
                value.name += suffix
    for gradient in graph_def.library.gradient:
        gradient.function_name += suffix
        gradient.gradient_func += suffix
