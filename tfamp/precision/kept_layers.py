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
from tfamp.files.saved_models import say_how_to_load
from tfamp.precision import autocast, beside_call, regions
from tfamp.precision.meant import DTYPES_16, meant, meant_dtype
from tfamp.precision.operations import PRODUCTS, resolve
from tfamp.precision.product_policy import (
    Float32AroundProducts,
    former_policy,
    policy_of,
    product_dtype,
)

_DOOR = "_tfamp_open_door"
_RETURNS = "_tfamp_returns"
_OWN_KEYS = (
    "layer",
    "operations",
    "keeps_call",
    "open_door",
    "returns",
    "former_policy",
)
_PRODUCT_KINDS = dict.fromkeys(PRODUCTS.names, "product")
_RECURRENT = (keras.layers.RNN, keras.layers.Bidirectional)
# Their state goes from step to step by sums alone.
_GATED = (
    keras.layers.GRUCell,
    keras.layers.LSTMCell,
    keras_internals.ConvLSTMCell,
)
Operations = bool | Mapping[str, Sequence[str]]


class _Kept:
    """What a kept layer's class has before the layer's own class."""

    name: str
    _tfamp_class: ClassVar[type]
    _tfamp_operations: ClassVar[str]
    _tfamp_keeps_call: ClassVar[bool]

    def get_config(self) -> dict:
        say_how_to_load()
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
            "keeps_call": cls._tfamp_keeps_call,
            "open_door": is_open(self),
            "returns": vars(self).get(_RETURNS),
            "former_policy": former_policy(self),
        }
        # What reads configs, as a functional model, looks for the name.
        return {**config, "name": self.name}

    @classmethod
    def from_config(cls, config: dict, custom_objects=None) -> keras.Layer:
        own = _own_class(cls, config)
        # A wrapper gives its copies other settings, as `Bidirectional` does.
        described = config["layer"]["config"]
        changed = {
            key: value
            for key, value in config.items()
            if key not in _OWN_KEYS and key in described
        }
        layer = keras.saving.deserialize_keras_object(
            {
                **config["layer"],
                "config": {**described, **changed},
            },
            # None leaves the caller's own scope of objects as it is.
            custom_objects={**own, **(custom_objects or {})} or None,
        )
        if config.get("keeps_call", True):
            keep(layer, config["operations"])
        else:
            keep_beside_call(layer, config["operations"])
        if config["open_door"]:
            open_door(layer, config["operations"])
        former = config.get("former_policy")
        if former is not None:
            # Keras reads of a policy in a file the name alone.
            for each in (layer, *_wrapped(layer)):
                each.dtype_policy = Float32AroundProducts(former)
            _keep_products_of(_cells(layer), former)
        if config.get("returns"):
            vars(layer)[_RETURNS] = config["returns"]
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
    return _become(layer, operations, keeps_call=True)


def keep_beside_call(
    layer: keras.layers.Layer, operations: Operations = True
) -> bool:
    """Lets a layer compute as a kept one what is no part of its `call`.

    That is an activity regularizer, and what a model overrides of its steps.
    A loss and logs, which they return, stay float32.

    Returns:
        Whether that was new; False for a layer that `keep` left alone.
    """
    if getattr(type(layer), "_tfamp_is_left", False):
        return False
    return _become(layer, operations, keeps_call=is_kept(layer))


def own_steps(model: keras.Model) -> list[str]:
    """The names of the steps that a model's class overrides."""
    return beside_call.own_steps(class_of(model))


def _become(layer, operations: Operations, keeps_call: bool) -> bool:
    own: Any = class_of(layer)
    if not isinstance(operations, bool):
        operations = {
            key: [names] if isinstance(names, str) else sorted(names)
            for key, names in sorted(operations.items())
        }
    spec = json.dumps(operations)
    kept = _kept_class(own, spec, keeps_call)
    is_new = type(layer) is not kept
    layer.__class__ = kept
    return is_new


def release(layer: keras.layers.Layer) -> bool:
    """Undoes `keep`; whether there was something to undo.

    A head whose products alone have 16 bits stays: that is for its output.
    """
    policy, own = policy_of(layer), class_of(layer)
    if isinstance(policy, Float32AroundProducts) and not (
        isinstance(layer, _RECURRENT) or hasattr(layer, "state_size")
    ):
        return False
    was_kept = own is not type(layer)
    layer.__class__ = own
    if vars(layer).pop(_DOOR, False):
        layer.autocast = True
    vars(layer).pop(_RETURNS, None)
    if isinstance(policy, Float32AroundProducts):
        layer.dtype_policy = policy.former
    return was_kept


def keep_products(layer: keras.layers.Layer) -> None:
    """Makes a layer of 16 bits float32 but for the operands of its products."""
    former = policy_of(layer).name
    for each in (layer, *_wrapped(layer)):
        each.dtype_policy = Float32AroundProducts(former)
    keep(layer, _operations_of(layer))


def keep_state(layer: keras.layers.Layer, *, casts_back: bool) -> None:
    """Lets a recurrent layer carry its state in float32 from step to step.

    The products of gates stay in 16 bits, but for those that cuDNN fuses. A
    cell of another kind may carry its state through a product, and is float32.

    Args:
        layer: an `RNN` or a `Bidirectional` of 16 bits.
        casts_back: whether what it returns takes 16 bits. States that it
            returns beside do not.
    """
    dtype = layer.compute_dtype
    _keep_products_of(_cells(layer), policy_of(layer).name)
    keep_products(layer)
    if isinstance(layer, keras.layers.Bidirectional):
        for each in (layer.forward_layer, layer.backward_layer):
            if each.compute_dtype in DTYPES_16:
                keep_state(each, casts_back=False)
    vars(layer)[_RETURNS] = dtype if casts_back else None


def return_float32(layer: keras.layers.Layer) -> bool:
    """Undoes `casts_back`; whether that was new."""
    return vars(layer).pop(_RETURNS, None) is not None


def has_gates(layer: keras.layers.Layer) -> bool:
    """Whether a recurrent layer has cells whose products may take 16 bits."""
    layer = getattr(layer, "forward_layer", layer)
    return any(isinstance(cell, _GATED) for cell in _cells(layer))


def _cells(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The cells of a recurrent layer, those in a stack included."""
    pending, cells = [getattr(layer, "cell", None)], []
    while pending:
        cell = pending.pop()
        if isinstance(cell, keras.layers.Layer):
            cells.append(cell)
            pending.extend(getattr(cell, "cells", ()))
    return cells


def _keep_products_of(cells: Sequence[keras.layers.Layer], former: str) -> None:
    """Makes cells float32, and their products as they were where they may."""
    for cell in cells:
        if policy_of(cell).name not in (former, "float32"):
            continue
        for each in (cell, *keras_internals.sublayers(cell)):
            each.dtype_policy = Float32AroundProducts(former)
        # The state of others may be carried on by a product.
        if isinstance(cell, _GATED):
            keep(cell, _operations_of(cell))


def _wrapped(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layer whose `call` a wrapper calls under its own policy."""
    is_wrapper = isinstance(layer, keras.layers.TimeDistributed)
    return [layer.layer] if is_wrapper else []


def _operations_of(layer: keras.layers.Layer) -> Operations:
    """What a layer was kept with; its products need no more."""
    return json.loads(getattr(type(layer), "_tfamp_operations", "true"))


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
    return isinstance(layer, _Kept) and type(layer)._tfamp_keeps_call


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
def _kept_class(own: Any, spec: str, keeps_call: bool) -> type:
    kinds = resolve(json.loads(spec))

    @functools.wraps(own.call)
    def call(self, *args, **kwargs):
        function = functools.partial(own.call, self)
        products = product_dtype(self)
        region = regions.current()
        seen = None if region is None else region.seen
        if products is not None:
            if isinstance(self, _RECURRENT):
                return _returned(self, function(*args, **kwargs))
            region = regions.Region(self, products, _PRODUCT_KINDS, seen, True)
            return autocast.run(region, function, args, kwargs)
        if (
            kinds is None
            or self.compute_dtype not in DTYPES_16
            or self.quantization_mode is not None
        ):
            if is_open(self) and self.compute_dtype == "float32":
                # It was put to float32 later, and takes what others round.
                args, kwargs = _as_float32(args), _as_float32(kwargs)
            return function(*args, **kwargs)
        if region is None or region.layer is not self or region.dtype is None:
            region = regions.Region(self, self.compute_dtype, kinds, seen)
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
        "_tfamp_keeps_call": keeps_call,
        "_tfamp_is_left": kinds is None,
        **({"call": call} if keeps_call else {}),
        **({} if kinds is None else beside_call.members(own, kinds)),
    }
    kept = type(own)(own.__name__, (_Kept, own), members)
    # One name for all of them: what a file describes is the layer inside.
    return keras.saving.register_keras_serializable(
        package="tfamp", name="KeptLayer"
    )(kept)


def _returned(layer, result):
    """What a recurrent layer computed, the states that it adds in float32."""
    dtype = vars(layer).get(_RETURNS)
    if dtype is None:
        return result
    leaves = keras.tree.flatten(result)
    count = len(leaves)
    if layer.return_state:
        count = 2 if getattr(layer, "merge_mode", "concat") is None else 1
    leaves[:count] = [keras.ops.cast(each, dtype) for each in leaves[:count]]
    return keras.tree.pack_sequence_as(result, leaves)


def _as_they_came(layer, structure):
    """Inputs in float32, which a product takes in 16 bits."""

    def opened(x):
        if not keras.ops.is_tensor(x) or meant_dtype(x) is not None:
            return x
        dtype = keras.backend.standardize_dtype(x.dtype)
        if dtype == layer.compute_dtype or not dtype.startswith(
            ("float", "bfloat")
        ):
            return x
        return meant(x, layer.compute_dtype)

    return keras.tree.map_structure(opened, structure)


def _as_float32(structure):
    """Float inputs as Keras gives them to a float32 layer."""

    def cast(x):
        if not keras.ops.is_tensor(x) or not keras.backend.is_float_dtype(
            keras.backend.standardize_dtype(x.dtype)
        ):
            return x
        return keras.ops.cast(x, "float32")

    return keras.tree.map_structure(cast, structure)


# Registered before any layer is kept, for a program that only loads.
keras.saving.register_keras_serializable(package="tfamp", name="KeptLayer")(
    _Kept
)
