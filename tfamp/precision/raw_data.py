"""Numbers of the data on their way to the first product.

Years, ids and prices are no numbers of 16 bits, and every layer rounds what it
takes, one that only moves them too. Where more is done with them than multiply
matrices, they are to come to it in float32: layers on the way that neither
multiply nor have weights become float32, and others take the data as they
come.

Which layers those are shows while a model is called on placeholders: its float
inputs are marked, and so is what is made of them alone. A mark says through
which layers the numbers went.
"""

from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.precision import float32_layers
from tfamp.precision.layer_paths import walk
from tfamp.precision.meant import DTYPES_16, dtype_name, leaves_of, mapped
from tfamp.precision.regions import Region, Seen

_MARK = "_tfamp_raw_data"
# Rounding before them and after them is the same.
_MOVING = (
    *("array", "broadcast_to", "cast", "concat", "concatenate", "copy"),
    *("convert_to_tensor", "crop_images", "dropout", "expand_dims", "flip"),
    *("gather", "getitem", "identity", "max_pool", "moveaxis", "pad", "ravel"),
    *("relu", "repeat", "reshape", "reverse", "roll", "rot90", "shuffle"),
    *("slice", "split", "squeeze", "stack", "stop_gradient", "swapaxes"),
    *("take", "take_along_axis", "tile", "transpose", "unstack"),
)


def mark_inputs(structure: Any) -> None:
    """Marks what a model takes; 16 bits are what they are already."""
    wide = [leaf for leaf in leaves_of(structure) if not _has_16_bits(leaf)]
    _mark(wide, frozenset())


def see_outputs(seen: Seen, structure: Any) -> None:
    """Notes that a model returns what it does."""
    seen.round_data.update(_way(structure))


def see_cast(region: Region | None, arguments: Any, result: Any) -> None:
    """Notes what a layer rounds before its own code runs."""
    if region is not None and region.seen is not None and _is_data(arguments):
        _mark(result, _way(arguments))


def see_operation(
    region: Region, name: str, is_product: bool, arguments: Any, result: Any
) -> None:
    """Notes what an operation of a layer does with the data."""
    seen = region.seen
    if seen is None:
        return
    if is_product:
        seen.multiply.add(id(region.noting))
    elif _is_data(arguments, some=True):
        # Ids are made by a cast too.
        if name not in _MOVING or not any(map(_is_float, leaves_of(result))):
            seen.round_data.update(_way(arguments), [id(region.noting)])
        if _is_data(arguments):
            _mark(result, _way(arguments))


def see_call(
    region: Region, layer: keras.layers.Layer, arguments: Any, result: Any
) -> Any:
    """Notes what a layer, which has been called in a region, takes.

    Returns:
        Its result, in float32 where the layer may become that.
    """
    seen = region.seen
    if seen is None:
        return result
    key, way = id(layer), _way(arguments)
    if key in seen.multiply:
        seen.multiply.add(id(region.noting))
    takes_data = _is_data(arguments)
    takes_wide = takes_data or not any(map(_is_float, leaves_of(arguments)))
    seen.take_wide[key] = takes_wide and seen.take_wide.get(key, True)
    seen.take_data[key] = takes_data and seen.take_data.get(key, True)
    if not takes_data:
        return result
    if not (layer.autocast and _is_16_bit(layer)):
        # It rounds nothing, and what it computes is not looked at.
        seen.round_data.update(way, [key])
    if key in seen.round_data:
        seen.round_data.add(id(region.noting))
    if _is_model_or_normalization(layer) or not _carries(layer, seen):
        return result
    result = mapped(result, _in_float32)
    _mark(result, way | {key})
    return result


def carriers(
    layers: list[keras.layers.Layer], seen: Seen
) -> list[keras.layers.Layer]:
    """The layers that are to be float32, with what is in them."""
    return [
        layer
        for layer in layers
        if _rounds_data(layer, seen)
        and not _is_model_or_normalization(layer)
        and _carries(layer, seen)
    ]


def needs_open_door(layer: keras.layers.Layer, seen: Seen) -> bool:
    """Whether a layer with weights or products needs the data as they come."""
    if not seen.take_data.get(id(layer)):
        return False
    inner = keras_internals.sublayers(layer)
    return _rounds_data(layer, seen) or any(
        not _is_16_bit(each) for each in inner
    )


def _rounds_data(layer: keras.layers.Layer, seen: Seen) -> bool:
    key = id(layer)
    return seen.take_data.get(key, False) and key in seen.round_data


def _is_model_or_normalization(layer: keras.layers.Layer) -> bool:
    """Whether data end in a layer, or reach what is in it by themselves."""
    return isinstance(layer, (keras.Model, keras.layers.Normalization))


def _carries(layer: keras.layers.Layer, seen: Seen) -> bool:
    """Whether a layer may be float32 as a whole at no cost."""
    if (
        not layer.autocast
        or id(layer) in seen.multiply
        or isinstance(layer, keras.layers.Masking)
    ):
        return False
    return not any(
        float32_layers.has_float32_step(each) or _has_own_floats(each)
        for each in (layer, *(place.layer for place in walk(layer)))
        # Its mean and variance are the data's.
        if not isinstance(each, keras.layers.Normalization)
    )


def _has_own_floats(layer: keras.layers.Layer) -> bool:
    inner = keras_internals.sublayers(layer)
    of_others = {id(each) for other in inner for each in other.variables}
    return any(
        keras.backend.is_float_dtype(each.dtype)
        for each in layer.variables
        if id(each) not in of_others
    )


def _mark(structure: Any, way: frozenset[int]) -> None:
    for leaf in leaves_of(structure):
        if _is_float(leaf):
            setattr(leaf, _MARK, way)


def _is_data(structure: Any, some: bool = False) -> bool:
    """Whether there are floats among the leaves, and all, or some, marked."""
    marks = [
        hasattr(leaf, _MARK)
        for leaf in leaves_of(structure)
        if _is_float(leaf) or isinstance(leaf, keras.Variable)
    ]
    return bool(marks) and (any(marks) if some else all(marks))


def _way(structure: Any) -> frozenset[int]:
    """The ids of the layers that numbers of the data went through."""
    empty: frozenset[int] = frozenset()
    return empty.union(
        *(getattr(leaf, _MARK, empty) for leaf in leaves_of(structure))
    )


def _is_16_bit(layer: keras.layers.Layer) -> bool:
    return layer.compute_dtype in DTYPES_16


def _is_float(leaf: Any) -> bool:
    if not tf.is_tensor(leaf):
        return False
    return "float" in (dtype_name(leaf.dtype) or "")


def _has_16_bits(leaf: Any) -> bool:
    return tf.is_tensor(leaf) and dtype_name(leaf.dtype) in DTYPES_16


def _in_float32(leaf: Any) -> Any:
    return tf.cast(leaf, tf.float32) if _has_16_bits(leaf) else leaf
