"""What a step on a GPU makes the host wait for, read off its graph."""

from collections.abc import Iterator

import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from benchmarks.gpu_kernels import STRUCTURE, is_call, kernel_of

# What they give is where it was before.
_PASSED_ON = {"Identity", "IdentityN"}


def host_reads(graph: tf.compat.v1.GraphDef) -> list[str]:
    """What a GPU computed and the host reads, in a step: "Source -> Reader".

    Each value counts once, whoever reads it. What a function gets from its
    caller is not followed: it counts where it was made, if it is read there.
    """
    functions = {each.signature.name: each for each in graph.library.function}
    found = []
    for body in (graph.node, *(f.node_def for f in functions.values())):
        nodes = {node.name: node for node in body}
        reads: dict[tuple[str, str], str] = {}
        for node in body:
            for source, argument in _inputs(node):
                if _reads(node, argument) and _is_on_gpu(nodes, source):
                    made_by = _made_by(nodes, source)
                    reads.setdefault(made_by, f"{node.op}.{argument}")
            if "While" in node.op:
                loop = functions[node.attr["cond"].func.name]
                inner = {each.name: each for each in loop.node_def}
                for source in loop.ret.values():
                    if _is_on_gpu(inner, source):
                        made_by = _made_by(inner, source)
                        reads.setdefault(made_by, f"{node.op}.cond")
        found += [
            f"{maker} -> {reader}" for (_, maker), reader in reads.items()
        ]
    return sorted(found)


def _inputs(node) -> Iterator[tuple[str, str]]:
    """Where each input of a node is from, and which argument it is."""
    definition = op_def_registry.get(node.op)
    names = _names(node, definition.input_arg) if definition else []
    sources = [each for each in node.input if not each.startswith("^")]
    return zip(sources, names, strict=False)


def _names(node, arguments) -> list[str]:
    """The name of each tensor's argument; some are lists of them."""
    names: list[str] = []
    for each in arguments:
        count = 1
        if each.number_attr:
            count = node.attr[each.number_attr].i
        elif each.type_list_attr:
            count = len(node.attr[each.type_list_attr].list.type)
        names += [each.name] * count
    return names


def _reads(node, argument: str) -> bool:
    """Whether a node takes that argument on the host."""
    if node.op in ("If", "StatelessIf"):
        return argument == "cond"
    if node.op in STRUCTURE | _PASSED_ON or is_call(node):
        return False
    if node.op.startswith("Assign"):
        # A variable is where it was made: here on a CPU, in a GPU's place.
        return False
    kernel = None if "CPU" in node.device.upper() else kernel_of(node)
    return kernel is None or argument in kernel.host_memory_arg


def _made_by(nodes: dict, source: str) -> tuple[str, str]:
    """Which node made it, and what that is: not what only passed it on."""
    node = nodes[source.split(":")[0]]
    if node.op in _PASSED_ON and len(node.input) == 1:
        return _made_by(nodes, node.input[0])
    return node.name, node.op


def _is_on_gpu(nodes: dict, source: str) -> bool:
    """Whether that output of one of the nodes is in a GPU's memory."""
    name, *rest = source.split(":")
    node = nodes.get(name)
    if node is None or node.op in STRUCTURE | {"IteratorGetNext"}:
        return False
    if is_call(node) or "CPU" in node.device.upper():
        return False
    if node.op in _PASSED_ON:
        return any(_is_on_gpu(nodes, each) for each, _ in _inputs(node))
    kernel = kernel_of(node)
    if kernel is None:
        return False
    output = rest[0] if rest else "0"
    if output.isdigit():
        # As graphs name it; functions have names.
        outputs = op_def_registry.get(node.op).output_arg
        output = _names(node, outputs)[int(output)]
    return output not in kernel.host_memory_arg
