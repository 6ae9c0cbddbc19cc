"""Layers that are float32 because they take the data as they come.

Which ones is for `raw_data` to say.
"""

import keras

from tfamp import keras_internals
from tfamp.precision import heads
from tfamp.precision.layer_paths import walk
from tfamp.precision.meant import DTYPES_16
from tfamp.precision.product_policy import policy_of

AS_THEY_COME = "data as they come, in float32"
INPUTS = "inputs as they come, ids among them"
_FORMER = "_tfamp_former_policy"


def keep(layer: keras.layers.Layer) -> bool:
    """Makes a layer and its sublayers float32; whether that was new."""
    narrow = [
        (each, policy_of(each))
        for each in (layer, *(place.layer for place in walk(layer)))
        if each.compute_dtype in DTYPES_16
    ]
    is_new = heads.set_float32(layer)
    for each, policy in narrow:
        vars(each)[_FORMER] = policy
    heads.say(layer, AS_THEY_COME)
    return is_new


def keep_input(model: keras.layers.Layer) -> bool:
    """Lets a Sequential without an Input take its inputs as they come.

    Returns:
        Whether it is one, and that was new.
    """
    is_narrow = keras_internals.input_dtype(model) in DTYPES_16
    if is_narrow:
        keras_internals.set_input_dtype(model, "float32")
    return is_narrow


def release(layer: keras.layers.Layer) -> bool:
    """Undoes `keep`; whether there was something to undo."""
    former = vars(layer).pop(_FORMER, None)
    if former is not None:
        heads.say(layer, None)
        layer.dtype_policy = former
    return former is not None
