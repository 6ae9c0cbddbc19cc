"""Which operations of a training step have no kernel for GPUs.

    python -m benchmarks.audit [RECIPE ...]

Needs no GPU: TensorFlow's wheel lists the kernels that it has, those for GPUs
among them. The step that `tfamp.fit` would run is traced, in each precision,
and never run. An operation without a kernel for its dtypes would be placed on
the host, and each step would wait for copies there and back.
"""

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from unittest import mock

import keras
import tensorflow as tf
from tensorflow.python.framework import kernels

import tfamp
from tfamp.layers import row_products
from tfamp.training.loop import Loop

RECIPES = (
    *("image_classification", "language_model", "text_classification"),
    *("segmentation", "line_recognition", "gan", "diffusion", "lora"),
)
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")

# What runs on the host by decision, and why.
ON_HOST = {
    "IteratorGetNext": "the data come from there",
    "CTCGreedyDecoder": "line_recognition reads lines for its error rates",
    "EditDistance": "line_recognition counts wrong characters",
}

# What has no kernel of its own: arguments, constants, calls of functions.
_STRUCTURE = {"Placeholder", "_Arg", "_Retval", "NoOp", "Const"}
# Which kernels a GPU can be given, by TensorFlow's placer.
_DEVICES = ("GPU", "DEFAULT")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation and its dtypes: `T=int64`, and so on."""

    type: str
    dtypes: str


class _Traced(Exception):
    """Carries the graph out of `fit`, before a step is run."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph


def training_graph(
    model: keras.Model, dataset: tf.data.Dataset
) -> tf.compat.v1.GraphDef:
    """The graph of the steps that `tfamp.fit` would run, not run."""

    def trace(loop, iterator, steps):
        function = loop._many_steps.get_concrete_function(
            iterator, tf.constant(steps)
        )
        raise _Traced(function.graph.as_graph_def())

    with (
        mock.patch.object(Loop, "run", trace),
        # What CPUs alone gain from is not in a GPU's step.
        mock.patch.object(row_products, "is_faster", return_value=False),
    ):
        try:
            tfamp.fit(model, dataset, jit=False, verbose=0)
        except _Traced as traced:
            return traced.graph
    raise RuntimeError("fit() came back without a step.")


def without_kernel(graph: tf.compat.v1.GraphDef) -> set[Operation]:
    """The operations that no GPU can run and that no one put on the host."""
    return {
        Operation(node.op, _dtypes(node))
        for node in _nodes(graph)
        if "CPU" not in node.device.upper() and not _has_kernel(node)
    }


def audit(
    name: str, precision: str
) -> tuple[int, list[Operation], list[Operation]]:
    """A recipe's step: operations, those on the host by decision, and others.

    The others are what must not be there.
    """
    recipe = importlib.import_module(f"recipes.{name}")
    config = config_of(recipe.Config, precision)
    tfamp.set_precision(precision)
    keras.utils.set_random_seed(0)
    dataset, _ = recipe.make_datasets(config)
    graph = training_graph(recipe.build_model(config), dataset.take(2))
    found = sorted(without_kernel(graph), key=lambda each: each.type)
    return (
        sum(1 for _ in _nodes(graph)),
        [each for each in found if each.type in ON_HOST],
        [each for each in found if each.type not in ON_HOST],
    )


def config_of(config_class: type, precision: str):
    """A recipe's flags, small: which operations there are, all layers tell."""
    # A base of its own would have to be trained.
    small = {"batch_size": 8, "sample_length": 0, "num_layers": 1}
    small |= {"base_epochs": 1, "base_steps_per_epoch": 1}
    fields = {field.name for field in dataclasses.fields(config_class)}
    return config_class(
        precision=precision,
        **{key: value for key, value in small.items() if key in fields},
    )


def _nodes(graph) -> Iterator:
    # A function may be called by its name, as if it were an operation.
    functions = {each.signature.name for each in graph.library.function}
    for body in (graph.node, *(f.node_def for f in graph.library.function)):
        for node in body:
            calls = any(
                value.HasField("func") or value.list.func
                for value in node.attr.values()
            )
            if node.op not in _STRUCTURE | functions and not calls:
                yield node


def _has_kernel(node) -> bool:
    return any(
        kernel.device_type in _DEVICES
        and all(
            _types(node, limit.name) <= set(limit.allowed_values.list.type)
            for limit in kernel.constraint
            if limit.allowed_values.list.type
        )
        for kernel in kernels.get_registered_kernels_for_op(node.op).kernel
    )


def _types(node, attribute: str) -> set[int]:
    value = node.attr[attribute]
    return {value.type} if value.type else set(value.list.type)


def _dtypes(node) -> str:
    found = {name: _types(node, name) for name in sorted(node.attr)}
    return " ".join(
        f"{name}={','.join(sorted(tf.as_dtype(t).name for t in types))}"
        for name, types in found.items()
        if types
    )


def main(*names: str) -> int:
    """Prints a row for each recipe and precision; 1 where one falls short."""
    print("| recipe | precision | operations | on the host | no kernel |")
    print("|---|---|---|---|---|")
    status = 0
    for name in names or RECIPES:
        for precision in PRECISIONS:
            count, host, missing = audit(name, precision)
            cells = [
                ", ".join(f"{each.type} {each.dtypes}" for each in found)
                for found in (host, missing)
            ]
            print(
                f"| {name} | {precision} | {count} | {cells[0] or '-'} | "
                f"{cells[1] or '-'} |",
                flush=True,
            )
            status = max(status, bool(missing))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
