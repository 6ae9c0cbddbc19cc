"""What of a model's outputs computes in float32.

A rounded product is no float32 number because it is cast: years and prices are
learned to the resolution of 16 bits, and beyond their range not at all. So a
head whose result is not bounded multiplies and adds in float32 where that is
cheap, and adds in float32 where it is not, as over a large vocabulary. Scores
between 0 and 1 are made of logits that 16 bits hold.
"""

import math

import keras

from tfamp.errors import InputError
from tfamp.precision import kept_layers
from tfamp.precision.float32_layers import Float32Activation
from tfamp.precision.layer_paths import walk
from tfamp.precision.meant import DTYPES_16
from tfamp.precision.product_policy import product_dtype

IN_FLOAT32 = "output in float32, with its product and bias"
AROUND_PRODUCT = "output and bias in float32, its matrix product in 16 bits"
BOUNDED = "output in float32, its matrix product in 16 bits"
WHOLE = "output in float32, and with it the whole layer"
_KEPT = "_tfamp_kept_head"

# A head of so many weights costs next to nothing in float32.
_FEW_WEIGHTS = 2**16
_BOUNDED = (
    keras.activations.hard_sigmoid,
    keras.activations.hard_tanh,
    keras.activations.log_softmax,
    keras.activations.sigmoid,
    keras.activations.softmax,
    keras.activations.softsign,
    keras.activations.sparse_sigmoid,
    keras.activations.sparsemax,
    keras.activations.tanh,
)
# They end with their activation, which is thus a place for a cast that leaves
# their matrix product alone.
_END_WITH_ACTIVATION = (
    keras.layers.Conv1D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2D,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3D,
    keras.layers.Conv3DTranspose,
    keras.layers.Dense,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.EinsumDense,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


def keep(layer: keras.layers.Layer) -> tuple[str, bool]:
    """Lets an output layer of 16 bits return float32.

    Returns:
        What was done, and whether that was new.
    """
    target = layer
    if isinstance(layer, keras.layers.TimeDistributed):
        # It runs the `call` of the wrapped layer under its own policy.
        target = layer.layer
    if isinstance(target, _END_WITH_ACTIVATION) and (
        # A quantized layer has no other arithmetic than its own.
        _is_bounded(target) or target.quantization_mode is not None
    ):
        return BOUNDED, _return_float32(target)
    if isinstance(layer, (keras.layers.RNN, keras.layers.Bidirectional)):
        kept_layers.keep_state(layer, casts_back=False)
        return "output and state in float32", True
    if not layer.weights:
        return "output in float32", set_float32(layer)
    if has_products_only(target) and _count(target) > _FEW_WEIGHTS:
        require_not_quantized([layer, target])
        kept_layers.keep_products(layer)
        return AROUND_PRODUCT, True
    changed, what = set_float32(layer), WHOLE
    if isinstance(target, _END_WITH_ACTIVATION):
        what = IN_FLOAT32
    say(layer, what)
    return what, changed


def say(layer: keras.layers.Layer, what: str | None) -> None:
    """Notes on a layer why it became float32; None for nothing."""
    vars(layer)[_KEPT] = what


def kept(layer: keras.layers.Layer) -> str | None:
    """Why a layer became float32; None if it was so before."""
    return vars(layer).get(_KEPT)


def set_float32(layer: keras.layers.Layer) -> bool:
    """Makes a layer and its sublayers float32; whether that was new."""
    affected = [layer, *(place.layer for place in walk(layer))]
    affected = [
        each
        for each in affected
        if each.compute_dtype in DTYPES_16 or product_dtype(each) is not None
    ]
    require_not_quantized(affected)
    for each in affected:
        each.dtype_policy = "float32"
    return bool(affected)


def require_not_quantized(layers) -> None:
    """Raises `InputError` for a quantized layer."""
    for each in layers:
        if each.quantization_mode is not None:
            raise InputError(
                f"Layer {each.name!r} is quantized"
                f" ({each.quantization_mode}) and cannot become float32; call"
                " keep_float32 before model.quantize, or leave the layer out."
            )


def has_products_only(layer: keras.layers.Layer) -> bool:
    """Whether a layer is one of Keras's around a single product."""
    known: tuple[type, ...] = _END_WITH_ACTIVATION
    # Keras before 3.13 has none.
    if reversible := getattr(keras.layers, "ReversibleEmbedding", None):
        known = (*known, reversible)
    return isinstance(layer, known) and not list(walk(layer))


def _is_bounded(layer) -> bool:
    activation = layer.activation
    if isinstance(activation, Float32Activation):
        activation = activation.activation
    return activation in _BOUNDED or isinstance(
        activation, keras.layers.Softmax
    )


def _count(layer) -> int:
    return sum(math.prod(weight.shape) for weight in layer.weights)


def _return_float32(layer) -> bool:
    """Leaves in float32 what the activation returns; whether it was new."""
    activation = layer.activation
    if isinstance(activation, Float32Activation):
        if not activation.cast_back:
            return False
        activation = activation.activation
    layer.activation = Float32Activation(activation, cast_back=False)
    return True
