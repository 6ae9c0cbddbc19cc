"""Random layers that draw in 16 bits what they draw in float32.

Another number format is another sequence of random numbers: dropout would drop
other elements, and the difference would be no error of precision. Such a layer
computes in float32 here, on what was rounded to 16 bits, and what it returns is
rounded.
"""

import contextlib
import functools
from collections.abc import Iterator

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.precision.layer_paths import walk
from tfamp.taps.gates import gate
from tfamp.taps.passing import map_floats

_DTYPES_16 = ("bfloat16", "float16")


def drawing_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers that draw random numbers by a seed of their own."""
    return [
        layer
        for layer in keras_internals.all_layers(model)
        if any(
            isinstance(value, keras.random.SeedGenerator)
            for value in vars(layer).values()
        )
        and not _drops_nothing(layer)
    ]


def _drops_nothing(layer: keras.layers.Layer) -> bool:
    """Of cells of recurrent layers, which have a seed in any case."""
    rates = [
        getattr(layer, name)
        for name in ("dropout", "recurrent_dropout")
        if hasattr(layer, name)
    ]
    return bool(rates) and not any(rates)


@contextlib.contextmanager
def drawn_alike(model: keras.Model) -> Iterator[None]:
    """Within it, random layers draw the same numbers in every precision."""
    with contextlib.ExitStack() as stack:
        for layer in drawing_layers(model):
            around = functools.partial(_call, layer)
            stack.enter_context(gate(layer, "call", around))
        yield


def _call(layer, call, /, *args, **kwargs):
    dtype = layer.compute_dtype
    if dtype not in _DTYPES_16:
        return call(*args, **kwargs)

    def cast_to(name):
        return lambda *spot: tf.cast(spot[-1], name)

    args, kwargs = map_floats(cast_to("float32"), (args, kwargs))
    layers = [layer, *(place.layer for place in walk(layer))]
    float32 = keras.dtype_policies.get("float32")
    with (
        keras_internals.dtype_policy_replaced(layers, float32),
        keras_internals.autocast_scope("float32"),
    ):
        outputs = call(*args, **kwargs)
    return map_floats(cast_to(dtype), outputs)
