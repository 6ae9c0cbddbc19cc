"""Layers of any class whose sensitive operations compute in float32.

The layer stays the same object. Its class becomes a subclass of its own class
that calls it in a region of `autocast`, and that a `.keras` file knows as
`tfamp>KeptLayer`: the file holds the description of the layer as it was,
and loading it keeps the loaded layer again.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras

from tfamp import keras_internals
from tfamp.precision import autocast
from tfamp.precision.operations import resolve

_DTYPES_16 = ("bfloat16", "float16")
_DOOR = "_tfamp_open_door"
Operations = bool | Mapping[str, Sequence[str]]


class _Kept:
    """What a kept layer's class has before the layer's own class."""

    name: str
    _tfamp_class: ClassVar[type]
    _tfamp_operations: ClassVar[str]

    def get_config(self) -> dict:
        cls = type(self)
        # The description of the layer as it was, which may ask for its class.
        self.__class__ = cls._tfamp_class
        try:
            layer = keras.saving.serialize_keras_object(self)
        finally:
            self.__class__ = cls
        # Told by what holds it, once it is a kept layer.
        layer.pop("compile_config", None)
        config = {
            "layer": layer,
            "operations": json.loads(cls._tfamp_operations),
            "open_door": is_open(self),
        }
        # What reads configs, as a functional model, looks for the name.
        return {**config, "name": self.name}

    @classmethod
    def from_config(cls, config: dict, custom_objects=None) -> keras.Layer:
        own = _own_class(cls, config)
        layer = keras.saving.deserialize_keras_object(
            config["layer"],
            # None leaves the caller's own scope of objects as it is.
            custom_objects={**own, **(custom_objects or {})} or None,
        )
        keep(layer, config["operations"])
        if config["open_door"]:
            open_door(layer, config["operations"])
        return layer


def keep(layer: keras.layers.Layer, operations: Operations = True) -> bool:
    """Lets a layer compute sensitive operations in float32.

    Args:
        layer: the layer; layers inside it follow.
        operations: as in `tfamp.keep_float32`; False leaves the layer alone
            also inside a layer that is kept.

    Returns:
        Whether that was new.
    """
    own: Any = class_of(layer)
    if not isinstance(operations, bool):
        operations = {
            key: [names] if isinstance(names, str) else sorted(names)
            for key, names in sorted(operations.items())
        }
    spec = json.dumps(operations)
    kept = _kept_class(own, spec)
    is_new = type(layer) is not kept
    layer.__class__ = kept
    return is_new


def release(layer: keras.layers.Layer) -> bool:
    """Undoes `keep`; whether there was something to undo."""
    own = class_of(layer)
    was_kept = own is not type(layer)
    layer.__class__ = own
    if vars(layer).pop(_DOOR, False):
        layer.autocast = True
    return was_kept


def open_door(layer: keras.layers.Layer, operations: Operations = True) -> bool:
    """Lets a kept layer or model take its float inputs as they come.

    Keras rounds them to 16 bits before the layer's own code runs, also those
    that are ids of an embedding or raw columns of a normalization. A product
    takes them in 16 bits all the same.

    Returns:
        Whether that was new.
    """
    keep(layer, operations)
    is_new = not is_open(layer)
    vars(layer)[_DOOR] = True
    layer.autocast = False
    return is_new


def is_open(layer: keras.layers.Layer) -> bool:
    """Whether `open_door` was called on it."""
    return vars(layer).get(_DOOR, False)


def is_kept(layer: keras.layers.Layer) -> bool:
    """Whether a layer's sensitive operations compute in float32."""
    return isinstance(layer, _Kept)


def class_of(layer: keras.layers.Layer) -> type[keras.layers.Layer]:
    """The class that a layer has, or had before it was kept."""
    return getattr(type(layer), "_tfamp_class", type(layer))


def _own_class(cls: type, config: dict) -> dict[str, type]:
    """The class of a copy in this program, which may be registered nowhere."""
    own = getattr(cls, "_tfamp_class", None)
    name = config["layer"]["registered_name"]
    is_found = keras.saving.get_registered_object(name) is not None
    if own is None or is_found or name != own.__name__:
        return {}
    return {name: own}


@functools.cache
def _kept_class(own: Any, spec: str) -> type:
    kinds = resolve(json.loads(spec))

    @functools.wraps(own.call)
    def call(self, *args, **kwargs):
        if (
            kinds is None
            or self.compute_dtype not in _DTYPES_16
            or self.quantization_mode is not None
        ):
            return own.call(self, *args, **kwargs)
        region = autocast.current()
        if region is None or region.layer is not self or region.dtype is None:
            seen = None if region is None else region.seen
            region = autocast.Region(self, self.compute_dtype, kinds, seen)
        function = functools.partial(own.call, self)
        if not is_open(self):
            return autocast.run(region, function, args, kwargs)
        args, kwargs = _as_they_came(self, (args, kwargs))
        with keras_internals.autocast_scope(self.compute_dtype):
            return autocast.run(region, function, args, kwargs)

    members = {
        "__module__": own.__module__,
        "__doc__": own.__doc__,
        "__qualname__": own.__qualname__,
        "_tfamp_class": own,
        "_tfamp_operations": spec,
        "_tfamp_is_left": kinds is None,
        "call": call,
    }
    kept = type(own)(own.__name__, (_Kept, own), members)
    # One name for all of them: what a file describes is the layer inside.
    return keras.saving.register_keras_serializable(
        package="tfamp", name="KeptLayer"
    )(kept)


def _as_they_came(layer, structure):
    """Inputs in float32, which a product takes in 16 bits."""

    def opened(x):
        if not keras.ops.is_tensor(x) or autocast.is_meant(x):
            return x
        dtype = keras.backend.standardize_dtype(x.dtype)
        if dtype == layer.compute_dtype or not dtype.startswith(
            ("float", "bfloat")
        ):
            return x
        return autocast.meant(x, layer.compute_dtype)

    return keras.tree.map_structure(opened, structure)


# Registered before any layer is kept, for a program that only loads.
keras.saving.register_keras_serializable(package="tfamp", name="KeptLayer")(
    _Kept
)
