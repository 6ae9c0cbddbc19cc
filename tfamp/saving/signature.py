"""What a model takes: names, shapes and dtypes, and batches of them.

Structures are those of the model's call; flat lists have the order of
`keras.tree.flatten`.
"""

import inspect
import keyword
import re
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.errors import InputError

# Of dimensions that nothing says, but the first.
_LENGTH = 32
# Ids that every embedding has, where a model has none to ask.
_IDS = 2


def signature_of(
    model: keras.Model, batch: Any = None, format: str | None = None
) -> Any:
    """The specs of a model's inputs, in the structure of its call.

    Floats of 16 bits are float32; the first dimension is open where the model
    leaves it open, and each spec has a name of its own.

    Args:
        model: built.
        batch: what it is called on, for a model that is no graph of layers.
        format: that it is exported in.

    Raises:
        InputError: it is not known what the model takes, or that is no tensor.
    """
    if type(model).call is keras.Model.call:
        parts = [
            name
            for name, value in vars(model).items()
            if isinstance(value, keras.Model)
        ]
        hint = f"its {' or '.join(parts)}" if parts else "a model that has one"
        raise InputError(f"Model {model.name!r} has no call; export {hint}.")
    structure = keras_internals.input_structure(model)
    if structure is None:
        structure = _from_batch(model, batch)
    names: set[str] = set()
    is_open = _has_batch_of_its_first_call(model, format)
    flat = [
        _spec(leaf, path, names, model, is_open)
        for path, leaf in keras.tree.flatten_with_path(structure)
    ]
    return keras.tree.pack_sequence_as(structure, flat)


def random_rows(specs: Any, rows: int, model: keras.Model, seed: int = 0):
    """A batch by chance: normal floats, ids that all embeddings have.

    Returns:
        A flat list of arrays.
    """
    draw = np.random.default_rng(seed)
    ids = min(
        (
            layer.input_dim
            for layer in keras_internals.all_layers(model)
            if isinstance(layer, keras.layers.Embedding)
        ),
        default=_IDS,
    )
    arrays = []
    for spec in keras.tree.flatten(specs):
        shape = [_LENGTH if n is None else n for n in spec.shape]
        if shape and spec.shape[0] is None:
            shape[0] = rows
        values: Any
        if spec.dtype.is_floating:
            values = draw.normal(size=shape)
        elif spec.dtype == tf.bool:
            values = draw.integers(0, 2, shape)
        elif spec.dtype.is_integer:
            values = draw.integers(0, ids, shape)
        else:
            raise InputError(
                f"Input {spec.name!r} of model {model.name!r} is of "
                f"{spec.dtype.name}; give batch=, rows to run it on."
            )
        arrays.append(np.asarray(values, spec.dtype.as_numpy_dtype))
    return arrays


def as_rows(specs: Any, batch: Any, model: keras.Model) -> list[np.ndarray]:
    """A batch as a flat list of arrays, of the dtypes that the file takes.

    Args:
        specs: from `signature_of`.
        batch: in the model's structure, or by the names of its inputs.
        model: for what is said.

    Raises:
        InputError: it does not fit.
    """
    flat_specs = keras.tree.flatten(specs)
    names = [spec.name for spec in flat_specs]
    # By name where a model takes a list, and the batch has names.
    if isinstance(batch, dict) and all(name in batch for name in names):
        flat = [batch[name] for name in names]
    else:
        flat = keras.tree.flatten(batch)
    if len(flat) != len(flat_specs):
        raise InputError(
            f"Model {model.name!r} takes {len(flat_specs)} inputs, "
            f"{', '.join(spec.name for spec in flat_specs)}; the batch has "
            f"{len(flat)}."
        )
    return [
        _fitted(array, spec, model)
        for array, spec in zip(flat, flat_specs, strict=True)
    ]


def inputs_of(element: Any) -> Any:
    """The inputs in an element of a dataset, `(x, y)` or `x`."""
    if isinstance(element, tuple):
        return keras.utils.unpack_x_y_sample_weight(element)[0]
    return element


def _from_batch(model, batch):
    taken = [
        name
        for name, parameter in inspect.signature(model.call).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(taken) > 1:
        raise InputError(
            f"The call of model {model.name!r} takes {', '.join(taken)}, and "
            "what is exported one argument; let it take a dict of them."
        )
    if batch is not None:
        return keras.tree.map_structure(_as_open, batch)
    shapes = keras_internals.called_shapes(model)
    if shapes is None:
        raise InputError(
            f"It is not known what model {model.name!r} takes; give "
            "batch=, what it is called on."
        )
    return _of_shapes(shapes)


def _of_shapes(shapes):
    """Specs of the shapes that a model was built with, floats all."""
    if isinstance(shapes, dict):
        return {key: _of_shapes(value) for key, value in shapes.items()}
    if all(n is None or isinstance(n, int) for n in shapes):
        return tf.TensorSpec([None, *shapes[1:]], tf.float32)
    return type(shapes)(map(_of_shapes, shapes))


def _as_open(x):
    if not hasattr(x, "dtype"):
        x = np.asarray(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if dtype == "float64":
        dtype = "float32"
    return tf.TensorSpec([None, *x.shape[1:]] if len(x.shape) else [], dtype)


def _has_batch_of_its_first_call(model, format) -> bool:
    """Whether a fixed batch need not be meant.

    Keras fixes that of a Sequential without an `Input` to what it is first
    called on. LiteRT needs a fixed one for the loop of a recurrent layer.
    """
    recurrent = [
        layer.stateful
        for layer in keras_internals.all_layers(model)
        if hasattr(layer, "stateful")
    ]
    is_needed = any(recurrent) or (format == "litert" and bool(recurrent))
    return isinstance(model, keras.Sequential) and not is_needed


def _spec(leaf, path, taken, model, is_open):
    if getattr(leaf, "sparse", False) or getattr(leaf, "ragged", False):
        raise InputError(
            f"Input {leaf.name!r} of model {model.name!r} is "
            f"{'sparse' if leaf.sparse else 'ragged'}; only dense tensors can "
            "be exported."
        )
    key = [str(each) for each in path if isinstance(each, str)]
    given = "_".join(key) or keras_internals.input_name(leaf) or "inputs"
    name = re.sub(r"\W", "_", given)
    # A graph's names begin with a letter, and are arguments in Python.
    if not name[0].isalpha() or keyword.iskeyword(name):
        name = f"input_{name}"
    unique, number = name, 1
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    taken.add(unique)
    dtype = tf.as_dtype(leaf.dtype)
    if dtype.is_floating and dtype.size == 2:
        dtype = tf.float32
    shape = tuple(leaf.shape)
    if is_open and shape:
        shape = (None, *shape[1:])
    return tf.TensorSpec(shape, dtype, unique)


def _fitted(array, spec, model) -> np.ndarray:
    if isinstance(array, (tf.SparseTensor, tf.RaggedTensor)):
        raise InputError(
            f"Input {spec.name!r} of model {model.name!r} came as "
            f"{type(array).__name__}; expected a dense one."
        )
    array = np.asarray(array)
    if spec.dtype != tf.string:
        array = array.astype(spec.dtype.as_numpy_dtype)
    # As Keras does with rows of one number.
    if array.ndim == len(spec.shape) - 1 and spec.shape[-1] == 1:
        array = array[..., None]
    if not spec.shape.is_compatible_with(array.shape):
        raise InputError(
            f"Input {spec.name!r} of model {model.name!r} has shape "
            f"{tuple(spec.shape)}; the batch has {array.shape}."
        )
    return array
