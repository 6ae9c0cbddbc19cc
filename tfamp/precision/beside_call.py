"""What a layer computes beside its `call`: its activity regularizer, its steps.

A sum over all outputs of a layer stops growing in 16 bits and overflows, and a
`train_step` of the model's own has softmaxes and norms outside of any layer.
"""

import functools
from collections.abc import Mapping
from typing import Any

import keras
from absl import logging

from tfamp.precision import autocast, regions
from tfamp.precision.meant import DTYPES_16

_REGULARIZER = "activity_regularizer"
_STEPS = ("train_step", "test_step", "predict_step", "compute_loss")


def own_steps(cls: type) -> list[str]:
    """The names of the steps that a class of models overrides."""
    return [
        name
        for name in _STEPS
        if issubclass(cls, keras.Model)
        and getattr(cls, name) is not getattr(keras.Model, name)
    ]


def members(cls: type, kinds: Mapping[str, str]) -> dict[str, Any]:
    """What a subclass of a layer's class has in the place of its own."""
    return {
        _REGULARIZER: _kept_regularizer(kinds),
        **{
            name: _kept_step(getattr(cls, name), kinds)
            for name in own_steps(cls)
        },
    }


def _kept_regularizer(kinds: Mapping[str, str]) -> property:
    """The layer's own, whose sum over all its outputs is float32."""

    def regularized(self, regularizer, output):
        dtype = keras.backend.standardize_dtype(output.dtype)
        if dtype not in DTYPES_16:
            return regularizer(output)
        region = regions.Region(self, dtype, kinds)
        with autocast.entered(region):
            return keras.ops.cast(regularizer(output), "float32")

    def get(self):
        regularizer = vars(self).get(_REGULARIZER)
        if regularizer is None:
            return None
        return functools.partial(regularized, self, regularizer)

    def assign(self, regularizer):
        vars(self)[_REGULARIZER] = regularizer

    return property(get, assign)


def _kept_step(function, kinds: Mapping[str, str]):
    @functools.wraps(function)
    def step(self, *args, **kwargs):
        if self.compute_dtype not in DTYPES_16:
            return function(self, *args, **kwargs)
        region = regions.Region(self, self.compute_dtype, kinds, is_step=True)
        with autocast.entered(region):
            try:
                return function(self, *args, **kwargs)
            except Exception:
                logging.warning(
                    "%s of %s ran with its sensitive operations in float32; if"
                    " it fails only then, keep_float32(model, operations=False)"
                    " before fit leaves them in %s.",
                    function.__name__,
                    type(self).__name__,
                    self.compute_dtype,
                )
                raise

    return step
