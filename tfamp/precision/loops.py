"""Loops and branches inside a kept layer.

They run functions of the caller, whose results must keep their dtypes from
one round to the next and from one branch to the other. What a loop carries
from round to round is a state, and stays in float32: 16 bits stop counting.
"""

import functools
import inspect
from collections.abc import Callable

import keras
import tensorflow as tf

from tfamp.precision import regions
from tfamp.precision.meant import (
    DTYPES_16,
    as_meant,
    dtype_name,
    leaves_of,
    mapped,
    meant,
    meant_dtype,
    meant_value,
)
from tfamp.precision.regions import Region
from tfamp.precision.replaced import run

# What a loop's state begins with, by the name of that argument: which argument
# of each round the state is (None for all of them).
_STATES = {"loop_vars": None, "init_val": 1, "init": 0, "initializer": 0}
# Where there is no such argument, or None, the state begins as an element.
_ELEMENTS = "elems"


def control(function: Callable) -> Callable:
    """What stands in the place of a loop or a branch."""
    signature = inspect.signature(function)
    name = next((n for n in _STATES if n in signature.parameters), None)
    begins_as_element = _ELEMENTS in signature.parameters and (
        name is not None or function.__name__ == "associative_scan"
    )

    @functools.wraps(function)
    def replacement(*args, **kwargs):
        region = regions.active()
        if region is None:
            return function(*args, **kwargs)
        with regions.within(None):
            bound = signature.bind(*args, **kwargs)
            if name is not None and bound.arguments.get(name) is not None:
                return _loop(region, function, bound, name)
            if begins_as_element:
                return _loop(region, function, bound, _ELEMENTS)

            def inside(value):
                if _is_function(value):
                    return functools.partial(_run_inside, region, value)
                return meant_value(value)

            args, kwargs = mapped((args, kwargs), inside)
            return function(*args, **kwargs)

    return replacement


def _is_function(value) -> bool:
    return inspect.isroutine(value) or isinstance(value, functools.partial)


def _run_inside(region, function, *args, **kwargs):
    return run(region, function, args, kwargs)


def _loop(region: Region, function: Callable, bound, name: str):
    """A loop whose state of 16 bits is float32 from round to round."""
    dtype = region.dtype or "float32"
    is_narrow = [_is_narrow(leaf) for leaf in leaves_of(bound.arguments[name])]
    if any(is_narrow):
        region.note(function.__name__)

    def widened(state):
        """Leaves that began with 16 bits in float32, the others as meant."""
        leaves = [
            meant(leaf, dtype) if narrow else meant_value(leaf)
            for leaf, narrow in zip(leaves_of(state), is_narrow, strict=True)
        ]
        return keras.tree.pack_sequence_as(state, leaves)

    def results(rest):
        """What rounds return beside: Keras stores it in the state's dtype."""
        if not any(is_narrow):
            return as_meant(rest)

        def wide(leaf):
            is_float = tf.is_tensor(leaf) and leaf.dtype.is_floating
            return meant(leaf, dtype) if is_float else leaf

        return mapped(rest, wide)

    def in_round(key, body, *args):
        index = _STATES.get(name)
        if name == _ELEMENTS:
            args = tuple(widened(each) for each in args)
        elif index is None:
            args = widened(args)
        else:
            args = (*args[:index], widened(args[index]), *args[index + 1 :])
        with regions.within(region):
            result = body(*args)
        if key == "cond":
            return result
        if name != "init":
            return widened(result)
        state, *rest = result
        return (widened(state), *results(rest))

    for key, value in bound.arguments.items():
        if key == name:
            bound.arguments[key] = widened(value)
        elif _is_function(value):
            bound.arguments[key] = functools.partial(in_round, key, value)
        else:
            bound.arguments[key] = mapped(value, meant_value)
    result = function(*bound.args, **bound.kwargs)
    if name != "init":
        return widened(result)
    state, *rest = result
    return (widened(state), *results(rest))


def _is_narrow(leaf) -> bool:
    """Whether a leaf has 16 bits, or stands for them."""
    return meant_dtype(leaf) is not None or (
        tf.is_tensor(leaf) and dtype_name(leaf.dtype) in DTYPES_16
    )
