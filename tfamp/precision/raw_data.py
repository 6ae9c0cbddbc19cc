"""Numbers of the data on their way to the first product.

Years, ids and prices are no numbers of 16 bits, and every layer rounds what it
takes, one that only moves them too. So they stay float32 until a product takes
them: layers that neither multiply matrices nor have weights of 16 bits become
float32, and others take the data as they come, where they do more with them
than multiply.

Which layers those are shows while a model is called on placeholders: its float
inputs are marked, and so is what is made of them alone.
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
# Of Keras's normalizations the others take them as they come.
_ROUND_THEIR_INPUTS = (keras.layers.BatchNormalization,)


def mark_inputs(structure: Any) -> None:
    """Marks what a model takes; 16 bits are what they are already."""
    mark([leaf for leaf in leaves_of(structure) if not _has_16_bits(leaf)])


def mark(structure: Any) -> None:
    """Marks floats as numbers of the data."""
    for leaf in leaves_of(structure):
        if _is_float(leaf):
            setattr(leaf, _MARK, True)


def are_marked(structure: Any, some: bool = False) -> bool:
    """Whether there are floats among the leaves, and all, or some, marked."""
    marks = [
        getattr(leaf, _MARK, False)
        for leaf in leaves_of(structure)
        if _is_float(leaf) or isinstance(leaf, keras.Variable)
    ]
    return bool(marks) and (any(marks) if some else all(marks))


def see_cast(region: Region | None, arguments: Any, result: Any) -> None:
    """Notes what a layer rounds before its own code runs."""
    if region is not None and region.seen is not None and are_marked(arguments):
        mark(result)


def see_operation(
    region: Region, name: str, is_product: bool, arguments: Any, result: Any
) -> None:
    """Notes what an operation of a layer does with the data."""
    seen = region.seen
    if seen is None:
        return
    key = id(region.noting)
    if is_product:
        seen.multiply.add(key)
        return
    if not are_marked(arguments, some=True):
        return
    if name != "convert_to_tensor":
        seen.compute_on_data.add(key)
    if are_marked(arguments):
        mark(result)


def see_call(
    region: Region, layer: keras.layers.Layer, arguments: Any, result: Any
) -> Any:
    """Notes what a layer, which has been called in a region, takes.

    Returns:
        Its result, in float32 where the layer is to be.
    """
    seen = region.seen
    if seen is None:
        return result
    key = id(layer)
    if key in seen.multiply:
        seen.multiply.add(id(region.noting))
    takes_data = are_marked(arguments)
    seen.take_data[key] = takes_data and seen.take_data.get(key, True)
    if not takes_data or not _carries(layer, seen):
        return result
    result = mapped(result, _in_float32)
    mark(result)
    return result


def carriers(
    layers: list[keras.layers.Layer], seen: Seen
) -> list[keras.layers.Layer]:
    """The layers that are to be float32, with what is in them."""
    return [
        layer
        for layer in layers
        if seen.take_data.get(id(layer)) and _carries(layer, seen)
    ]


def needs_open_door(
    layer: keras.layers.Layer, seen: Seen, is_own: bool
) -> bool:
    """Whether a layer with weights or products does more with the data.

    Args:
        layer: a layer that rounds what it takes.
        seen: what a call of the model showed.
        is_own: whether its class is neither Keras's nor ours.
    """
    if not seen.take_data.get(id(layer)):
        return False
    if not is_own:
        return isinstance(layer, _ROUND_THEIR_INPUTS)
    inner = keras_internals.sublayers(layer)
    return id(layer) in seen.compute_on_data or any(
        not _is_16_bit(each) for each in inner
    )


def _carries(layer: keras.layers.Layer, seen: Seen) -> bool:
    if (
        not layer.autocast
        or isinstance(layer, keras.Model)
        or id(layer) in seen.multiply
        or isinstance(layer, (keras.layers.Masking, *_ROUND_THEIR_INPUTS))
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
