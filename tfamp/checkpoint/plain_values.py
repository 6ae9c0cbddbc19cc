"""Values of Python as JSON and arrays, and back: nothing is pickled.

What is read from a checkpoint can so be a number, a text, an array or a
container of those, and never code.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_PLAIN = (bool, int, float, str)
_SEQUENCES: dict[str, type] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}


class NotPlain(TypeError):
    """A value that is more than numbers, texts, arrays and containers."""


def encode(value: Any, arrays: list[np.ndarray]) -> Any:
    """The value as JSON holds it; its arrays are added to `arrays`.

    Raises:
        NotPlain: for functions, variables, files and other objects.
    """
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, (np.ndarray, np.generic, tf.Tensor)):
        array = _as_array(value)
        arrays.append(array)
        kind = "tensor" if isinstance(value, tf.Tensor) else "array"
        if isinstance(value, np.generic):
            kind = "number"
        return [kind, len(arrays) - 1]
    kinds = [kind for kind, cls in _SEQUENCES.items() if type(value) is cls]
    if kinds:
        items = sorted(value, key=repr) if "set" in kinds[0] else value
        return [kinds[0], [encode(each, arrays) for each in items]]
    if type(value) is dict:
        pairs = [
            [encode(key, arrays), encode(each, arrays)]
            for key, each in value.items()
        ]
        return ["dict", pairs]
    raise NotPlain(type(value).__name__)


def decode(encoded: Any, arrays: Sequence[np.ndarray]) -> Any:
    """What `encode` was given.

    Raises:
        ValueError: for what `encode` does not return.
    """
    if not isinstance(encoded, list):
        return encoded
    kind, content = encoded
    match kind:
        case "array":
            return arrays[content]
        case "number":
            return arrays[content][()]
        case "tensor":
            return keras.ops.convert_to_tensor(arrays[content])
        case "dict":
            return {
                decode(key, arrays): decode(each, arrays)
                for key, each in content
            }
        case _ if kind in _SEQUENCES:
            return _SEQUENCES[kind](decode(each, arrays) for each in content)
    raise ValueError(f"no kind of value: {kind!r}")


def pack(arrays: Sequence[np.ndarray]) -> tuple[list[list[Any]], bytes]:
    """Dtype and shape of each, and the bytes of all."""
    described = [[str(each.dtype), list(each.shape)] for each in arrays]
    return described, b"".join(each.tobytes() for each in arrays)


def unpack(described: Sequence[list[Any]], content: bytes) -> list[np.ndarray]:
    """The arrays that `pack` was given.

    Raises:
        ValueError: for bytes that are too few.
    """
    arrays, begin = [], 0
    for name, shape in described:
        # NumPy does not know bfloat16 by its name.
        dtype = np.dtype(tf.as_dtype(name).as_numpy_dtype)
        end = begin + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(content[begin:end], dtype)
        # A copy, since what is read from bytes cannot be written to.
        arrays.append(flat.reshape(shape).copy())
        begin = end
    return arrays


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, tf.Tensor) and not hasattr(value, "numpy"):
        raise NotPlain("a tensor of a graph")
    array = np.asarray(value)
    try:
        is_number = not tf.as_dtype(array.dtype).is_compatible_with(tf.string)
    except TypeError:
        is_number = False
    if not is_number:
        raise NotPlain(f"an array of {array.dtype}")
    return np.ascontiguousarray(array).reshape(array.shape)
