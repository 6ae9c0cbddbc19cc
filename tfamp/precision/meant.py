"""Tensors that are float32 because of us, and stand for 16 bits.

Inside a kept layer each tensor has the dtype that it has in memory, and the
one that the same code gives it without us. The second is remembered on tensors
that are float32 because of us ("meant" for 16 bits): a product takes them in
16 bits, and so does the end of the layer. What a program itself made float32
carries no mark and stays so.
"""

import contextlib
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.precision import regions

DTYPES_16 = ("bfloat16", "float16")
_MEANT = "_tfamp_meant"
_ROUNDED = "_tfamp_rounded"


def as_meant(structure):
    """Takes what is float32 because of us to the 16 bits that it stands for."""
    with regions.within(None):
        return mapped(structure, meant_value)


def as_it_is(structure):
    """Takes what is float32 because of us as float32, for whatever it stood."""

    def plain(value):
        return value if meant_dtype(value) is None else tf.identity(value)

    with regions.within(None):
        return mapped(structure, plain)


def meant(tensor, dtype: str):
    """The same numbers, to be taken in 16 bits by a product."""
    with regions.within(None):
        tensor = tf.identity(tf.cast(tensor, tf.float32))
    setattr(tensor, _MEANT, dtype)
    return tensor


def meant_dtype(tensor) -> str | None:
    """What a product takes it in; None for what is what it is."""
    return getattr(tensor, _MEANT, None)


def mark(structure, dtype: str) -> None:
    """Marks what is float32 as meant for a dtype."""
    for leaf in leaves_of(structure):
        if tf.is_tensor(leaf) and dtype_name(leaf.dtype) == "float32":
            with contextlib.suppress(AttributeError):
                setattr(leaf, _MEANT, dtype)


def mark_rounded(source, result) -> None:
    """Marks a layer's input that Keras rounded to 16 bits before its `call`.

    Args:
        source: what it was made of: float32 of the program's own, or a marked
            tensor.
        result: the input.
    """
    is_own = has_float32([source]) and meant_dtype(source) is None
    if (is_own or is_rounded(source)) and has_16_bits([result]):
        with contextlib.suppress(AttributeError):
            setattr(result, _ROUNDED, True)


def is_rounded(tensor) -> bool:
    """Whether it is such an input, or a part of one."""
    return getattr(tensor, _ROUNDED, False)


def meant_dtypes(structure, by_keras: bool) -> set[str]:
    """The dtypes that the floats among the arguments stand for."""
    found = set()
    for leaf in leaves_of(structure):
        if isinstance(leaf, np.ndarray) and not by_keras:
            # TensorFlow converts it to the dtype of the other operand.
            continue
        name = meant_dtype(leaf)
        if name is None and hasattr(leaf, "dtype"):
            name = dtype_name(leaf.dtype)
        if name is not None and ("float" in name or "complex" in name):
            found.add(name)
    return found


def has_float32(structure) -> bool:
    """Whether there is a float32 tensor among the arguments."""
    return any(
        tf.is_tensor(leaf) and dtype_name(leaf.dtype) == "float32"
        for leaf in leaves_of(structure)
    )


def has_16_bits(structure) -> bool:
    """Whether there is one of 16 bits among them."""
    return any(
        hasattr(leaf, "dtype") and dtype_name(leaf.dtype) in DTYPES_16
        for leaf in leaves_of(structure)
    )


def float32_value(value):
    """What has 16 bits in float32; a variable as it is stored."""
    if isinstance(value, keras.Variable):
        if keras.backend.is_float_dtype(value.dtype):
            return tf.cast(keras_internals.uncast_value(value), tf.float32)
        return value
    if tf.is_tensor(value) and dtype_name(value.dtype) in DTYPES_16:
        return tf.cast(value, tf.float32)
    return value


def meant_value(value):
    """What is float32 because of us in the 16 bits that it stands for."""
    name = meant_dtype(value)
    if name is not None and tf.is_tensor(value):
        return tf.cast(value, name)
    return value


def dtype_name(dtype) -> str | None:
    """The name of a dtype; None for what is none."""
    if dtype is None:
        return None
    try:
        return tf.as_dtype(dtype).base_dtype.name
    except (TypeError, ValueError):
        return None


def leaves_of(structure) -> list:
    """All leaves."""
    return keras.tree.flatten(structure)


def mapped(structure, function: Callable):
    """The structure with a function called on each leaf."""
    return keras.tree.map_structure(function, structure)
