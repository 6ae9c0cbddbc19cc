"""A model as a SavedModel: the trace that all formats are made of."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.errors import InputError
from tfamp.precision.computing import all_in_float32

_NARROW = {
    tf.as_dtype(name).as_datatype_enum
    for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
}
SIGNATURE = "serving_default"


@contextlib.contextmanager
def computing(model: keras.Model, precision: str) -> Iterator[None]:
    """Within it the model computes as the file will.

    Args:
        model: its state is put back afterwards.
        precision: "float32", or the model's own.
    """
    # A draw at inference moves a seed, a layer of the user's own its state.
    state = {id(v): v for v in model.non_trainable_variables}.values()
    before = [(variable, tf.identity(variable.value)) for variable in state]
    try:
        with (
            all_in_float32(model)
            if precision == "float32"
            else contextlib.nullcontext()
        ):
            yield
    finally:
        for variable, value in before:
            variable.assign(value)


def call(model: keras.Model, specs: Any, rows: list[np.ndarray]) -> list:
    """What the model itself makes of rows: a flat list of arrays."""
    inputs = keras.tree.pack_sequence_as(specs, [tf.constant(x) for x in rows])
    return [
        np.asarray(_widened(tf.convert_to_tensor(each)))
        for each in keras.tree.flatten(model(inputs, training=False))
    ]


def write(
    model: keras.Model, specs: Any, path: str | os.PathLike, precision: str
) -> list[str]:
    """Writes a SavedModel that takes and returns float32 where it has floats.

    Call it within `computing`.

    Returns:
        The names of the outputs, in the order of the model's.

    Raises:
        InputError: the graph is to be float32 and has 16 bits.
    """
    names: list[str] = []

    def serve(inputs):
        outputs = model(inputs, training=False)
        flat = [_widened(each) for each in keras.tree.flatten(outputs)]
        structure = _flat_structure(outputs)
        names[:] = _names(structure)
        if isinstance(structure, tf.Tensor):
            return flat[0]
        if isinstance(structure, dict):
            return dict(zip(names, flat, strict=True))
        return flat

    archive = keras.export.ExportArchive()
    archive.track(model)
    function = archive.add_endpoint("serve", serve, [specs])
    graph = function.get_concrete_function().graph
    if precision == "float32":
        refuse_16_bits(graph.as_graph_def(), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.write_out(os.fspath(path), verbose=False)
    return list(names)


def opened(path: str | os.PathLike, inputs: list[str], outputs: list[str]):
    """A SavedModel as a function of a flat list of arrays."""
    loaded = tf.saved_model.load(os.fspath(path))
    signature = loaded.signatures[SIGNATURE]

    def run(rows: list[np.ndarray]) -> list[np.ndarray]:
        found = signature(
            **{
                name: tf.constant(x)
                for name, x in zip(inputs, rows, strict=True)
            }
        )
        # What it was loaded from must live as long.
        run.keeps = loaded  # type: ignore[attr-defined]
        return [np.asarray(found[name]) for name in outputs]

    return run


def refuse_16_bits(
    definition: tf.compat.v1.GraphDef, model: keras.Model
) -> None:
    """Looks for operations of 16 or 8 bits, in functions of the graph too.

    Constants that are cast to float32 at once compute nothing.

    Raises:
        InputError: there is one; names it and its layer.
    """
    bodies = [
        definition.node,
        *(f.node_def for f in definition.library.function),
    ]
    for nodes in bodies:
        harmless = _widened_constants(nodes)
        for node in nodes:
            dtype = _narrow_dtype(node)
            if dtype is None or node.name in harmless:
                continue
            raise InputError(
                f"{_where(node.name, model)} computes in {dtype} whatever the "
                f"precision ({node.op} {node.name!r}); let it compute in "
                "self.compute_dtype, or cast its result, to export in float32."
            )


def layer_of(name: str, model: keras.Model) -> str | None:
    """The innermost layer in whose scope an operation is, if there is one."""
    # A graph numbers a scope that it has had before.
    scopes = [(each, re.sub(r"_\d+$", "", each)) for each in name.split("/")]
    known = {
        layer.name
        for layer in keras_internals.all_layers(model)
        if layer is not model
    }
    for both in reversed(scopes):
        for each in both:
            if each in known:
                return each
    return None


def _where(name, model) -> str:
    layer = layer_of(name, model)
    return f"Layer {layer!r}" if layer else f"Model {model.name!r}"


def _narrow_dtype(node) -> str | None:
    for attribute in node.attr.values():
        for enum in (attribute.type, *attribute.list.type):
            if enum in _NARROW:
                return tf.as_dtype(enum).name
    return None


def _widened_constants(nodes) -> set[str]:
    """Constants of 16 bits all of whose readers cast them, and the casts."""
    constants = {
        node.name
        for node in nodes
        if node.op == "Const" and _narrow_dtype(node)
    }
    readers: dict[str, list] = {name: [] for name in constants}
    for node in nodes:
        for text in node.input:
            source = text.removeprefix("^").split(":")[0]
            if source in readers:
                readers[source].append(node)
    harmless = set()
    for name, casts in readers.items():
        if all(
            node.op == "Cast" and node.attr["DstT"].type not in _NARROW
            for node in casts
        ):
            harmless |= {name, *(node.name for node in casts)}
    return harmless


def _widened(tensor):
    if tensor.dtype in (tf.float16, tf.bfloat16):
        return tf.cast(tensor, tf.float32)
    return tensor


def _flat_structure(outputs):
    """As it is where a signature may have it so, by paths else."""
    if isinstance(outputs, tf.Tensor):
        return outputs
    if isinstance(outputs, dict):
        return {
            "_".join(map(str, path)): leaf
            for path, leaf in keras.tree.flatten_with_path(outputs)
        }
    return keras.tree.flatten(outputs)


def _names(structure) -> list[str]:
    if isinstance(structure, dict):
        return list(structure)
    count = 1 if isinstance(structure, tf.Tensor) else len(structure)
    return [f"output_{i}" for i in range(count)]
