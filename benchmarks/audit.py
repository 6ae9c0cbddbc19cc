"""Which operations of a training step have no kernel for GPUs.

    python -m benchmarks.audit [RECIPE ...]

Needs no GPU: TensorFlow's wheel lists the kernels that it has, those for GPUs
among them. The step that `tfamp.fit` would run is traced, in each precision,
and never run. An operation without a kernel for its dtypes would be placed on
the host, and each step would wait for copies there and back. Counted are also
the reads of what a GPU computed by the host, of each of which a step waits.
"""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from unittest import mock

import keras
import tensorflow as tf

import tfamp
from benchmarks.gpu_kernels import STRUCTURE, dtypes_of, is_call, kernel_of
from benchmarks.host_reads import host_reads
from tfamp.layers import row_products
from tfamp.scaling import optimizer
from tfamp.step import build
from tfamp.training.loop import Loop

RECIPES = (
    *("image_classification", "language_model", "text_classification"),
    *("segmentation", "line_recognition", "gan", "diffusion", "lora"),
)
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")

# What runs on the host by decision, and why.
ON_HOST = {
    "IteratorGetNext": "the data come from there",
}


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

    with mock.patch.object(Loop, "run", trace), _choices_of_gpus():
        try:
            tfamp.fit(model, dataset, jit=False, verbose=0)
        except _Traced as traced:
            return traced.graph
    raise RuntimeError("fit() came back without a step.")


@contextlib.contextmanager
def _choices_of_gpus() -> Iterator[None]:
    """Within it a step is traced as for a GPU."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        # What CPUs alone gain from is not in a GPU's step.
        enter(mock.patch.object(row_products, "is_faster", return_value=False))
        for module in (build, optimizer):
            enter(
                mock.patch.object(module, "computes_on_gpus", return_value=True)
            )
        yield


def without_kernel(graph: tf.compat.v1.GraphDef) -> set[Operation]:
    """The operations that no GPU can run and that no one put on the host."""
    return {
        Operation(node.op, _dtypes(node))
        for node in _nodes(graph)
        if "CPU" not in node.device.upper() and kernel_of(node) is None
    }


def audit(
    name: str, precision: str
) -> tuple[int, list[Operation], list[Operation], list[str]]:
    """A recipe's step: operations, those on the host by decision, and others.

    The others are what must not be there. And what the host reads.
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
        host_reads(graph),
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
            if node.op not in STRUCTURE | functions and not is_call(node):
                yield node


def _dtypes(node) -> str:
    found = {name: dtypes_of(node, name) for name in sorted(node.attr)}
    return " ".join(
        f"{name}={','.join(sorted(tf.as_dtype(t).name for t in types))}"
        for name, types in found.items()
        if types
    )


def main(*names: str) -> int:
    """Prints a row for each recipe and precision; 1 where one falls short."""
    print(
        "| recipe | precision | operations | on the host | no kernel | "
        "host reads |"
    )
    print("|---|---|---|---|---|---|")
    status = 0
    for name in names or RECIPES:
        for precision in PRECISIONS:
            count, host, missing, reads = audit(name, precision)
            cells = [
                ", ".join(f"{each.type} {each.dtypes}" for each in found)
                for found in (host, missing)
            ]
            print(
                f"| {name} | {precision} | {count} | {cells[0] or '-'} | "
                f"{cells[1] or '-'} | {len(reads)} |",
                flush=True,
            )
            status = max(status, bool(missing))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
