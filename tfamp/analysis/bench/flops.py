"""Floating-point operations of the matrix products of one training step.

Counted are matrix products and convolutions, forward and backward: what
matrix units do, and what published shares of a device's peak are made of. A
multiplication and an addition are two operations, so that a product of m x k
by k x n counts 2 m n k. What works on single elements does not count.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.distribute.strategy import Share
from tfamp.step import build

_MATMULS = {
    "MatMul": "transpose_a",
    "BatchMatMul": "adj_x",
    "BatchMatMulV2": "adj_x",
    "BatchMatMulV3": "adj_x",
}
# Operation -> which of its inputs the filter is; None where it is the result.
# Its sums run over the filter, for each element that goes in or comes out.
_CONVOLUTIONS = {
    "Conv2D": 1,
    "Conv3D": 1,
    "Conv2DBackpropInput": 1,
    "Conv3DBackpropInputV2": 1,
    "Conv2DBackpropFilter": None,
    "Conv3DBackpropFilterV2": None,
    "DepthwiseConv2dNative": 1,
    "DepthwiseConv2dNativeBackpropInput": 1,
    "DepthwiseConv2dNativeBackpropFilter": None,
}
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_BRANCHES = ("If", "StatelessIf", "Case", "StatelessCase")
_DTYPES_16 = (
    tf.float16.as_datatype_enum,
    tf.bfloat16.as_datatype_enum,
)
_LOOPS = ("While", "StatelessWhile")
# Products inside of them cannot be seen.
_OPAQUE = ("CudnnRNN", "CudnnRNNV3")


class UncountableError(Exception):
    """The graph does not tell how many products a step computes."""


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product or convolution of a step.

    Attributes:
        operation: its type in TensorFlow's graph.
        flops: its floating-point operations.
        widths: the last dimension of each operand and of the result, whose
            elements lie side by side in memory; none for a depthwise
            convolution, which no matrix unit computes.
        is_16_bit: whether its operands are float16 or bfloat16.
    """

    operation: str
    flops: int
    widths: tuple[int, ...]
    is_16_bit: bool = False


def products_of_step(
    model: keras.Model, element_spec: Any, rows: int
) -> list[Product]:
    """The products of a training step over all replicas.

    The step is traced, and not run.

    Args:
        model: compiled, with optimizer and all variables built.
        element_spec: of the dataset it trains on.
        rows: of the global batch.

    Raises:
        UncountableError: products lie in a loop, or a shape is not known.
    """
    strategy = model.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    is_custom = type(model).train_step is not keras.Model.train_step
    with strategy.scope():
        keras_internals.build_everything(model, element_spec)
    step = (
        build.custom_train_step(model)
        if is_custom
        else build.train_step(model, strategy, microbatches=1, jit=False)
    )

    def one_step(data):
        count = tf.constant(rows, tf.int64)
        share = Share(data, count // replicas, count)
        strategy.run(step, args=(share,))

    specs = tf.nest.map_structure(
        lambda spec: _with_rows(spec, rows // replicas), element_spec
    )
    traced = tf.function(one_step, autograph=False)
    with (
        strategy.scope(),
        keras_internals.additional_losses_in_float32(model),
    ):
        graph = traced.get_concrete_function(specs).graph
    return products_of_graph(graph)


def products_of_graph(graph: tf.Graph) -> list[Product]:
    """The products that running a graph once computes.

    Of the branches of a condition the one with the most operations counts.
    What nothing asks for does not: TensorFlow prunes it, such as the gradient
    of a convolution's input where the convolution is the first layer.

    Args:
        graph: of a `tf.function`.

    Raises:
        UncountableError: products lie in a loop, or a shape is not known.
    """
    definition = graph.as_graph_def(add_shapes=True)
    functions = {f.signature.name: f for f in definition.library.function}
    results = [tensor.op.name for tensor in graph.outputs]
    effects = [operation.name for operation in graph.control_outputs]
    return _products(definition.node, {}, results + effects, functions)


def total(products: Iterable[Product]) -> int:
    """The operations of all products."""
    return sum(product.flops for product in products)


def share_off_multiple(products: Sequence[Product], multiple: int) -> float:
    """The share of the operations with a width that is no multiple of it."""
    off = [p for p in products if any(w % multiple for w in p.widths)]
    return total(off) / max(total(products), 1)


def _with_rows(spec, rows):
    if not isinstance(spec, tf.TensorSpec):
        return spec
    return tf.TensorSpec([rows, *spec.shape[1:]], spec.dtype)


def _products(nodes, argument_shapes, roots, functions) -> list[Product]:
    shapes = argument_shapes | {
        node.name: _shapes(node.attr["_output_shapes"]) for node in nodes
    }
    found = []
    for node in _needed(nodes, roots):
        if node.op in _CALLS:
            found += _products_of_function(node.attr["f"].func.name, functions)
        elif node.op in _BRANCHES:
            names = [f.name for f in node.attr["branches"].list.func] or [
                node.attr[branch].func.name
                for branch in ("then_branch", "else_branch")
            ]
            found += max(
                (_products_of_function(name, functions) for name in names),
                key=total,
            )
        elif node.op in _LOOPS:
            if _products_of_function(node.attr["body"].func.name, functions):
                raise UncountableError(
                    f"{node.name} loops over matrix products, and the graph "
                    "does not tell how often"
                )
        elif node.op in _OPAQUE:
            raise UncountableError(f"{node.name} is one {node.op}")
        elif node.op in (*_MATMULS, *_CONVOLUTIONS, "Einsum"):
            inputs = [
                _input_shape(name, shapes)
                for name in node.input
                if not name.startswith("^")
            ]
            found.append(_product(node, inputs, shapes[node.name][0]))
    return found


def _products_of_function(name, functions) -> list[Product]:
    function = functions[name]
    arguments = {
        argument.name: _shapes(
            function.arg_attr[position].attr["_output_shapes"]
        )
        for position, argument in enumerate(function.signature.input_arg)
    }
    roots = [*function.ret.values(), *function.control_ret.values()]
    return _products(function.node_def, arguments, roots, functions)


def _needed(nodes, roots) -> list:
    """The nodes that the roots hang on, in their order."""
    by_name = {node.name: node for node in nodes}
    needed, pending = set(), [_source(name) for name in roots]
    while pending:
        name = pending.pop()
        if name in by_name and name not in needed:
            needed.add(name)
            pending += map(_source, by_name[name].input)
    return [node for node in nodes if node.name in needed]


def _product(node, inputs, result) -> Product:
    known = [shape for shape in (*inputs, result) if shape is not None]
    if result is None or len(known) < 2 or any(-1 in s for s in known):
        raise UncountableError(f"{node.name} has a shape that is not known")
    if node.op == "Einsum":
        flops = _flops_of_einsum(node.attr["equation"].s.decode(), inputs)
    elif node.op in _MATMULS:
        is_transposed = node.attr[_MATMULS[node.op]].b
        inner = inputs[0][-2 if is_transposed else -1]
        flops = 2 * math.prod(result) * inner
    else:
        flops = _flops_of_convolution(node.op, inputs, result)
    is_depthwise = "Depthwise" in node.op
    # A vector among the inputs is the shape of a gradient.
    operands = [s for s in known if len(s) > 1 and not is_depthwise]
    widths = tuple(shape[-1] for shape in operands)
    kind = node.attr["Ta" if "Ta" in node.attr else "T"].type
    return Product(node.op, flops, widths, kind in _DTYPES_16)


def _flops_of_convolution(operation, inputs, result) -> int:
    position = _CONVOLUTIONS[operation]
    kernel = result if position is None else inputs[position]
    # Backward, the third input is the gradient of what the layer returns.
    returned = inputs[2] if "Backprop" in operation else result
    spatial = len(kernel) - 2
    # A kernel is spatial x in x out; with groups, "in" is that of one group.
    inner = kernel[:spatial] if "Depthwise" in operation else kernel[:-1]
    return 2 * math.prod(returned) * math.prod(inner)


def _flops_of_einsum(equation, inputs) -> int:
    operands = equation.partition("->")[0].split(",")
    if len(operands) == 1:
        return 0
    sizes: dict[str | int, int] = {}
    for labels, shape in zip(operands, inputs, strict=True):
        before, _, after = labels.partition("...")
        broadcast = len(shape) - len(before) - len(after)
        # From the right, as broadcasting aligns them.
        names = [*before, *range(-broadcast, 0), *after]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return 2 * math.prod(sizes.values())


def _source(name):
    # "node", "node:1" in a graph; "argument", "node:output:1" in a function;
    # "^node" where only the order matters.
    return name.removeprefix("^").partition(":")[0]


def _input_shape(name, shapes):
    found = shapes.get(_source(name))
    index = int(name.rpartition(":")[2]) if ":" in name else 0
    return None if not found or index >= len(found) else found[index]


def _shapes(attribute) -> list[list[int] | None]:
    """Shapes of an attribute; None for an unknown rank, -1 for a dimension."""
    return [
        None if shape.unknown_rank else [d.size for d in shape.dim]
        for shape in attribute.list.shape
    ]
