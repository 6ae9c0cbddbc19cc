"""Which layers compute a model's outputs.

Found by running the model on placeholders and noting which layer returned
which tensor, because that is the same for functional, sequential and
subclassed models, nested ones, and layers that hold layers.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from tfamp import keras_internals
from tfamp.errors import InputError

# These move numbers and compute none. Their input is as much the model's
# output as what they return.
_MOVE_ONLY = (
    keras.layers.Concatenate,
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Cropping3D,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.Identity,
    keras.layers.Permute,
    keras.layers.RepeatVector,
    keras.layers.Reshape,
)
# Layers of Keras that create their sublayers themselves, also when loaded:
# only the outer layer's settings are saved.
_OWNERS = (
    keras.layers.Bidirectional,
    keras.layers.GroupQueryAttention,
    keras.layers.MultiHeadAttention,
    keras.layers.RNN,
)
_WRAPPERS = (keras.layers.SpectralNormalization, keras.layers.TimeDistributed)
_PRODUCTS = ("Dot", "Einsum", "Inner", "Matmul", "Outer", "Tensordot", "Vdot")
_DTYPES_16 = ("bfloat16", "float16")
_KERAS_SAYS_WHERE = "Exception encountered when calling"


class CannotTrace(InputError):
    """A model that cannot be called on placeholders, as it is."""


@dataclasses.dataclass(frozen=True)
class _Call:
    operation: keras.Operation
    inputs: list
    outputs: list


def find_output_layers(
    model: keras.Model, layers: Sequence[keras.layers.Layer], batch=None
) -> list[keras.layers.Layer]:
    """Returns the layers whose result a model returns, in calling order.

    Both training and inference are looked at: auxiliary outputs exist in one
    of them. Behind a layer that only moves numbers (`Reshape`, `Dropout`) and
    behind `keras.ops` of a functional model, the layer before counts too.

    Args:
        model: a built model.
        layers: all layers of the model, itself included.
        batch: a batch of data, whose shapes and dtypes the placeholders get.

    Raises:
        CannotTrace: the model cannot be run on placeholders.
        InputError: a 16-bit output comes from operations that belong to no
            layer.
    """
    owner_of = _owners(layers)
    found = {}
    for training in (False, True):
        outputs, calls = _trace(model, layers, training, batch)
        makers: dict[int, list[_Call]] = {}
        for call in calls:
            for tensor in call.outputs:
                makers.setdefault(id(tensor), []).append(call)
        for tensor in outputs:
            for layer in _layers_behind(tensor, makers):
                layer = owner_of.get(id(layer), layer)
                found[id(layer)] = layer
    return list(found.values())


def require_float32_outputs(
    model: keras.Model, layers: Sequence[keras.layers.Layer], batch=None
) -> None:
    """Raises InputError if a model, as it is now, returns 16-bit floats."""
    for training in (False, True):
        outputs, _ = _trace(model, layers, training, batch)
        for index, tensor in enumerate(outputs):
            if _is_16_bit(tensor):
                raise InputError(
                    f"Output {index} of model {model.name!r} stays"
                    f" {_dtype(tensor)}; {_FIX}"
                )


_FIX = (
    "cast it where the model returns it, with keras.ops.cast(x, 'float32') or"
    " a last keras.layers.Activation('linear', dtype='float32'), or pass"
    " outputs=False."
)


def _layers_behind(tensor, makers) -> list[keras.layers.Layer]:
    calls = makers.get(id(tensor), [])
    if not calls or not keras.backend.is_float_dtype(_dtype(tensor)):
        return []
    # The innermost call returns first. Later calls handed the tensor through:
    # containers, which do not touch it, or layers such as an inactive dropout,
    # whose policy must not take it back to 16 bits.
    creator, *passers = calls
    layers = []
    for call in passers:
        if not _sublayers(call.operation):
            layers.append(call.operation)
    operation = creator.operation
    if isinstance(operation, keras.layers.Layer):
        if not _is_container(operation):
            layers.append(operation)
        elif _is_16_bit(tensor):
            raise InputError(
                f"A {_dtype(tensor)} output comes from operations in the call"
                f" of {type(operation).__name__} {operation.name!r}, not from"
                f" one of its layers; {_FIX}"
            )
        reaches_through = isinstance(operation, _MOVE_ONLY)
    else:
        if type(operation).__name__ in _PRODUCTS and _is_16_bit(tensor):
            raise InputError(
                f"A {_dtype(tensor)} output comes from the matrix product"
                f" {operation.name!r}, which belongs to no layer; {_FIX}"
            )
        reaches_through = True
    if reaches_through:
        for source in creator.inputs:
            layers.extend(_layers_behind(source, makers))
    return [each for each in layers if isinstance(each, keras.layers.Layer)]


def _is_container(layer: keras.layers.Layer) -> bool:
    known = isinstance(layer, (*_OWNERS, *_WRAPPERS))
    return bool(_sublayers(layer)) and not known


def _sublayers(operation: keras.Operation) -> list[keras.layers.Layer]:
    if not isinstance(operation, keras.layers.Layer):
        return []
    return keras_internals.sublayers(operation)


def _owners(layers) -> dict[int, keras.layers.Layer]:
    """The outermost owner of each layer that Keras creates by itself."""
    owner_of: dict[int, keras.layers.Layer] = {}
    for layer in layers:
        if isinstance(layer, _OWNERS):
            pending = keras_internals.sublayers(layer)
            while pending:
                sublayer = pending.pop()
                owner_of.setdefault(id(sublayer), layer)
                pending.extend(keras_internals.sublayers(sublayer))
    return owner_of


def _trace(model, layers, training: bool, batch) -> tuple[list, list[_Call]]:
    """The model's flat outputs, and all calls, innermost and earliest first."""
    operations = {id(each): each for each in layers}
    for layer in layers:
        # A functional model also holds operations that are no layers.
        for operation in getattr(layer, "operations", ()):
            operations[id(operation)] = operation
    problem = None
    for args, kwargs in placeholders(model, batch):
        calls: list[_Call] = []
        outputs: list = []

        def run(args, kwargs, outputs=outputs):
            result = model(*args, **kwargs, training=training)
            outputs.extend(_tensors(result))

        try:
            with _recording(operations.values(), calls):
                keras_internals.run_symbolically(run, args, kwargs)
        # The model's own code runs here, and may raise anything.
        except Exception as error:
            problem = error
        else:
            return outputs, calls
    remedy = "" if batch is not None else "pass batch=, one of its data, or "
    raise CannotTrace(
        f"Cannot trace model {model.name!r} to find its output layers"
        f" ({said(problem)}); {remedy}cast the outputs"
        " to float32 in its call and pass outputs=False."
    )


def said(error: Exception | None) -> str:
    """What an error is and says, and where a layer raised it, in one line."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    # Keras says first where it was, and then what.
    where = ""
    if len(lines) > 1 and lines[0].startswith(_KERAS_SAYS_WHERE):
        where = lines.pop(0).removeprefix(_KERAS_SAYS_WHERE).strip(" .")
    what = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return f"in {where}, {what}" if where else what


@contextlib.contextmanager
def _recording(operations, calls: list[_Call]) -> Iterator[None]:
    """Within it, each call of an operation is appended to `calls`."""
    replaced = []
    try:
        for operation in operations:
            for method in ("call", "quantized_call"):
                attributes = vars(operation)
                replaced.append((attributes, method, attributes.get(method)))
                # Past Layer.__setattr__, which tracks what it is given.
                attributes[method] = _recorded(
                    operation, getattr(operation, method), calls
                )
        yield
    finally:
        for attributes, method, former in replaced:
            if former is None:
                del attributes[method]
            else:
                attributes[method] = former


def _recorded(operation, function, calls: list[_Call]):
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(
            _Call(operation, _tensors((args, kwargs)), _tensors(result))
        )
        return result

    return call


def placeholders(model, batch=None) -> list[tuple[tuple, dict]]:
    """Arguments to call a model with, in the order in which to try them."""
    if batch is not None:
        x = keras.utils.unpack_x_y_sample_weight(batch)[0]
        return [((keras.tree.map_structure(_placeholder, x),), {})]
    if isinstance(model, keras.Sequential) and getattr(model, "inputs", None):
        return [((model.inputs[0],), {})]
    if hasattr(model, "operations"):
        return [((model.input,), {})]
    config = model.get_build_config()
    if not config:
        raise InputError(
            f"The input shape of model {model.name!r} is unknown; call it once"
            " on a batch, or model.build(input_shape), before keep_float32."
        )
    # Only shapes are recorded: numbers first, then token ids.
    attempts: list[tuple[tuple, dict[str, Any]]] = []
    for dtype in ("float32", "int32"):
        if "input_shape" in config:
            tensors = _keras_tensors(config["input_shape"], dtype)
            attempts.append(((tensors,), {}))
        else:
            shapes = config["shapes_dict"].items()
            attempts.append(
                (
                    (),
                    {
                        name.removesuffix("_shape"): _keras_tensors(s, dtype)
                        for name, s in shapes
                    },
                )
            )
    return attempts


def _keras_tensors(shape, dtype: str):
    if isinstance(shape, dict):
        return {key: _keras_tensors(s, dtype) for key, s in shape.items()}
    if all(size is None or isinstance(size, int) for size in shape):
        return keras.KerasTensor(tuple(shape), dtype=dtype)
    return [_keras_tensors(each, dtype) for each in shape]


def _placeholder(array) -> keras.KerasTensor:
    if not hasattr(array, "dtype"):
        array = keras.ops.convert_to_tensor(array)
    return keras.KerasTensor(tuple(array.shape), dtype=_dtype(array))


def _tensors(structure) -> list:
    leaves = keras.tree.flatten(structure)
    return [leaf for leaf in leaves if keras.ops.is_tensor(leaf)]


def _dtype(tensor) -> str:
    return keras.backend.standardize_dtype(tensor.dtype)


def _is_16_bit(tensor) -> bool:
    return _dtype(tensor) in _DTYPES_16
