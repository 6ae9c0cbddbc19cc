"""Layers of a model replaced by faster ones that compute the same.

Which ones, and whether they are worth it, was measured layer by layer; what
showed no gain is not here.
"""

import dataclasses

import keras

from tfamp.errors import InputError
from tfamp.layers import batch_norm, norms, pointwise_convolution
from tfamp.precision import before, output_layers, sensitive_layers
from tfamp.precision.keep_float32 import forget_traces
from tfamp.precision.layer_paths import Place, walk

_FUSED_BATCH_NORM = "batch normalization in one operation"
_LEAN_NORM = "normalization with a lean gradient"
_POINTWISE = "1x1 convolution as a product of matrices"


@dataclasses.dataclass(frozen=True)
class FastLayer:
    """A layer that was replaced by a faster one.

    Attributes:
        path: the names of the layers around it and its own, joined by "/".
        reason: how it computes now.
        changed: False if it did so before.
    """

    path: str
    reason: str
    changed: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def optimize(model: keras.Model) -> list[FastLayer]:
    """Replaces layers of a model by faster ones that compute the same.

    - `BatchNormalization` of images: one fused operation, which reads and
      writes 16 bits and computes in float32, in training and inference.
    - `RMSNormalization` and `LayerNormalization` over the last axis: the
      backward pass keeps the 16-bit input in place of float32 intermediates,
      and needs fewer passes over memory.
    - 1x1 `Conv2D`, on CPUs: products of matrices.

    Results differ from Keras's by rounding alone: both compute in float32
    inside, in another order. The model is changed in place and stays what it
    was: the same layer objects, names, weights, settings and dtype policies.
    Weights and checkpoints of the model as it was fit the model as it is, and
    the other way round. `keep_float32` may come before or after, and so may
    `compile`, whose next step is traced anew. Calling this again changes
    nothing.

    Left alone are a user's subclasses of these layers, and settings for which
    the faster layer has no equal: other axes, `synchronized`, `renorm`,
    low-rank weights.

    A `.keras` file keeps all this; load it with `tfamp.load_model`. Excepted
    are layers that a class of your own creates: the reason says so, and the
    call is repeated after loading.

    Args:
        model: a built model: functional, sequential or subclassed.

    Returns:
        The faster layers, in the model's order.

    Raises:
        InputError: this is no model, or one that is not built; a layer can no
            longer be called, in which case the model is put back as it was.
    """
    if not isinstance(model, keras.Model):
        raise InputError(
            f"Expected a keras.Model, got {type(model).__name__}; put the"
            " layer into a model."
        )
    if not sensitive_layers.is_built(model):
        raise InputError(
            f"Model {model.name!r} is not built; call it once on a batch, or"
            " model.build(input_shape), before optimize."
        )
    places = list(walk(model))
    former = before.remember(place.layer for place in places)
    found = []
    for place in places:
        reason = _REASONS.get(type(place.layer))
        changed = reason is None and _replace(place.layer)
        if changed:
            reason = _REASONS[type(place.layer)]
        if reason is not None:
            found.append(FastLayer(place.path, _note(reason, place), changed))
    if any(each.changed for each in found):
        _require_call(model, former)
        forget_traces(model)
    return found


def _require_call(model: keras.Model, former) -> None:
    """Puts a model back that could be called before and cannot now."""
    if not sensitive_layers.has_call(model):
        return
    seen, error = sensitive_layers.call(model, None)
    if error is None:
        return
    changed = before.remember(each.layer for each in former)
    before.put_back(former)
    _, error_without = sensitive_layers.call(model, None)
    if error_without is not None:
        # It cannot be called on placeholders at all, which says nothing.
        before.put_back(changed)
        return
    layer = model if seen.failed is None else seen.failed
    raise InputError(
        f"Layer {layer.name!r} cannot be called with what optimize puts into"
        f" it ({output_layers.said(error)}); the model is as it was. Leave"
        " optimize out."
    )


_FASTER = {
    keras.layers.BatchNormalization: (
        batch_norm.BatchNormalization,
        batch_norm.is_fusible,
        _FUSED_BATCH_NORM,
    ),
    keras.layers.Conv2D: (
        pointwise_convolution.Conv2D,
        pointwise_convolution.is_pointwise,
        _POINTWISE,
    ),
    keras.layers.LayerNormalization: (
        norms.LayerNormalization,
        norms.has_last_axis,
        _LEAN_NORM,
    ),
    keras.layers.RMSNormalization: (
        norms.RMSNormalization,
        norms.has_last_axis,
        _LEAN_NORM,
    ),
}
_REASONS = {cls: reason for cls, _, reason in _FASTER.values()}


def _replace(layer: keras.layers.Layer) -> bool:
    """Turns a layer in place into its faster counterpart, if it has one.

    The layer object stays the same, with its weights, its name and its place
    in the graph of every model that holds it.
    """
    # Not isinstance: what a user's subclass computes is unknown.
    found = _FASTER.get(type(layer))
    if found is None or not layer.built:
        return False
    faster, is_equal, _ = found
    if not is_equal(layer):
        return False
    layer.__class__ = faster
    return True


def _note(reason: str, place: Place) -> str:
    if place.saved:
        return reason
    return reason + "; not saved, repeat optimize after loading"
