"""What a training step keeps from its forward to its backward pass.

Counted in the traced graph, where every tensor has a shape and a dtype, and no
allocator rounds: exactly, the same on every machine, and without running a
step. What grappler or XLA make of the graph afterwards is not in it.
"""

import dataclasses
from collections.abc import Iterable

import keras
import tensorflow as tf

from tfamp import keras_internals

# They hand on the memory of their first input under another shape or name.
_ALIASES = frozenset(
    (
        "ExpandDims",
        "Identity",
        "PreventGradient",
        "Reshape",
        "Squeeze",
        "StopGradient",
    )
)
# Static shapes make constants of these.
_SHAPES = frozenset(
    ("Rank", "Shape", "ShapeN", "Size", "OnesLike", "ZerosLike")
)


@dataclasses.dataclass(frozen=True)
class KeptTensor:
    """A tensor that waits for the backward pass.

    Attributes:
        name: of the operation that made it.
        shape: its shape.
        dtype: its dtype.
        num_bytes: its size in memory.
        of_weights: whether it is made of weights alone, such as their 16-bit
            copies: it does not grow with the batch.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    of_weights: bool


@dataclasses.dataclass(frozen=True)
class KeptBytes:
    """What one step keeps.

    Attributes:
        tensors: the kept ones, the largest first. Variables and constants are
            not among them, and views of one tensor count once.
        num_casts: conversions of floats in forward and backward pass.
    """

    tensors: tuple[KeptTensor, ...]
    num_casts: int

    @property
    def total(self) -> int:
        """Bytes of all kept tensors."""
        return sum(each.num_bytes for each in self.tensors)

    @property
    def of_weights(self) -> int:
        """Bytes of those that are made of weights alone."""
        return sum(each.num_bytes for each in self.tensors if each.of_weights)

    @property
    def in_float32(self) -> int:
        """Bytes of those that are float32."""
        return sum(
            each.num_bytes for each in self.tensors if each.dtype == "float32"
        )


def kept_bytes(model: keras.Model, x, y) -> KeptBytes:
    """Counts what a step on this batch keeps.

    Args:
        model: a compiled model.
        x: the inputs of a batch, as the model takes them.
        y: its targets.

    Returns:
        The kept tensors. Those of unknown shape are left out.
    """
    optimizer = model.optimizer
    loss_scale = getattr(optimizer, "scale_loss", lambda loss: loss)
    bounds = []

    @tf.function(autograph=False)
    def step(x, y):
        graph = tf.compat.v1.get_default_graph()
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = loss_scale(model.compute_loss(x, y, outputs))
        bounds.append(len(graph.get_operations()))
        gradients = tape.gradient(
            loss, [*map(keras_internals.stored, model.trainable_variables)]
        )
        return [each for each in gradients if each is not None]

    graph = step.get_concrete_function(
        *keras.tree.map_structure(tf.convert_to_tensor, (x, y))
    ).graph
    # A first call may trace more than once, to create variables.
    return _count(graph, bounds[-1])


def _count(graph, num_forward: int) -> KeptBytes:
    operations = graph.get_operations()
    # The order in which they were made is one of the computation.
    forward = {op.name for op in operations[:num_forward]}
    needed = _needed(graph.outputs)
    kinds: dict[str, str] = {}
    kept = {}
    for op in operations[num_forward:]:
        if op.name not in needed:
            continue
        for tensor in op.inputs:
            if tensor.op.name not in forward:
                continue
            tensor = _root(tensor)
            kind = _kind(tensor, kinds)
            if kind in ("activation", "copy of weights"):
                kept[tensor.name] = tensor, kind
    tensors = [
        KeptTensor(
            tensor.op.name,
            tuple(tensor.shape),
            tensor.dtype.name,
            tensor.shape.num_elements() * tensor.dtype.size,
            kind == "copy of weights",
        )
        for tensor, kind in kept.values()
        if tensor.shape.is_fully_defined() and tensor.dtype.size
    ]
    casts = [
        op
        for op in operations
        if op.type == "Cast"
        and op.inputs[0].dtype.is_floating
        and (op.name in needed or op.name in forward)
    ]
    tensors.sort(key=lambda each: (-each.num_bytes, each.name))
    return KeptBytes(tuple(tensors), len(casts))


def _needed(outputs: Iterable[tf.Tensor]) -> set[str]:
    """Operations that the outputs depend on; TensorFlow prunes the others."""
    pending = [tensor.op for tensor in outputs]
    found = set()
    while pending:
        op = pending.pop()
        if op.name not in found:
            found.add(op.name)
            pending.extend(tensor.op for tensor in op.inputs)
    return found


def _root(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor whose memory this one is a view of."""
    while True:
        op = tensor.op
        if op.type in _ALIASES:
            tensor = op.inputs[0]
        elif op.type == "IdentityN":
            tensor = op.inputs[tensor.value_index]
        else:
            return tensor


def _kind(tensor: tf.Tensor, kinds: dict[str, str]) -> str:
    """constant, variable, copy of weights, input or activation."""
    pending = [tensor.op]
    while pending:
        op = pending[-1]
        if op.name in kinds:
            pending.pop()
            continue
        unknown = [each.op for each in op.inputs if each.op.name not in kinds]
        if unknown and op.type not in _SHAPES:
            pending.extend(unknown)
            continue
        pending.pop()
        kinds[op.name] = _kind_from(
            op, {kinds.get(each.op.name) for each in op.inputs}
        )
    return kinds[tensor.op.name]


def _kind_from(op, inputs: set[str | None]) -> str:
    if op.type == "Placeholder":
        return "variable" if op.outputs[0].dtype == tf.resource else "input"
    # Products take a transposed matrix as it lies in memory.
    views = (*_ALIASES, "IdentityN", "Transpose")
    if op.type == "ReadVariableOp" or (
        op.type in views
        and inputs <= {"variable", "constant"}
        and "variable" in inputs
    ):
        return "variable"
    if op.type in _SHAPES and op.outputs[0].shape.is_fully_defined():
        return "constant"
    is_random = "Random" in op.type
    if inputs <= {"constant"} and not is_random:
        return "constant"
    if inputs <= {"constant", "variable", "copy of weights"} and not is_random:
        return "copy of weights"
    return "activation"
