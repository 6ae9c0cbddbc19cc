"""Which layers stay in float32, and why.

A 16-bit softmax saturates, and its gradient is then exactly 0; a 16-bit sum
of squares overflows; a 16-bit output loses what the loss needs. Their matrix
products lose nothing: their sums run in float32 inside the hardware. So the
former compute in float32 and the latter do not.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import keras

from tfamp import keras_internals
from tfamp.errors import InputError
from tfamp.precision import (
    before,
    data_layers,
    float32_layers,
    heads,
    kept_layers,
    output_layers,
    sensitive_layers,
)
from tfamp.precision.float32_layers import Float32Activation
from tfamp.precision.kept_layers import Operations
from tfamp.precision.layer_paths import Place, choose, walk
from tfamp.precision.meant import DTYPES_16
from tfamp.precision.operations import resolve
from tfamp.precision.product_policy import product_dtype

_BY_POLICY = "float32 by its own dtype policy"
_STATE = "state in float32 from step to step, products of gates in 16 bits"
_STATE_AND_PRODUCTS = "state and products in float32 from step to step"
_MASKING = "values to mask looked for before they are rounded"
_RECURRENT = (keras.layers.RNN, keras.layers.Bidirectional)
_SOFTMAXES = (
    keras.activations.log_softmax,
    keras.activations.softmax,
    keras.activations.sparsemax,
)
# Keras casts their input to float32 inside and the result back. A float32
# policy would only store the result in twice the memory.
_FLOAT32_INSIDE = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    *(
        [keras.layers.RMSNormalization]
        if keras_internals.RMS_NORMALIZATION_IS_FLOAT32
        else []
    ),
)
_ATTENTION_BY_HEADS = (
    keras.layers.GroupQueryAttention,
    keras.layers.MultiHeadAttention,
)


@dataclasses.dataclass(frozen=True)
class Float32Layer:
    """A layer that computes in float32 inside a 16-bit model.

    Attributes:
        path: the names of the layers around it and its own, joined by "/".
        reason: what of it computes in float32, and why.
        changed: False if it did so before.
    """

    path: str
    reason: str
    changed: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def keep_float32(
    model: keras.Model,
    layers: str | keras.layers.Layer | Sequence[str | keras.layers.Layer] = (),
    outputs: bool = True,
    operations: Operations = True,
    batch: Any = None,
) -> list[Float32Layer]:
    """Keeps in float32 what 16 bits would spoil.

    These compute in float32: every softmax (a layer, an activation, inside
    attention), every normalization, and the model's outputs. The matrix
    products around them stay in 16 bits. The model is changed in place, and
    calling this again changes nothing. Layers that compute in float32 or
    float64 already are left alone.

    Numbers of the data reach unrounded what does more with them than multiply
    matrices: layers on their way that neither multiply nor have weights become
    float32, and others take their inputs as they come. So does a Sequential
    without an Input, which Keras gives one of 16 bits.

    So do sensitive operations (`tfamp.precision.operations` is the table) in
    the code of any layer: `keras.ops`, functions of `tf`, `tf.math`, `tf.nn`,
    `tf.linalg`, `tf.image` and the like, and the operators of tensors. Their
    results stay float32 until a product, or the end of the layer, takes them in
    16 bits; what the code made float32 itself stays so. Which layers need it is
    found by calling the model on placeholders; those whose code mixes float32
    and 16 bits, which Keras cannot call, are among them. They stay the same
    objects, and their class becomes a subclass of their own. In what the model
    itself overrides of `train_step`, `test_step`, `predict_step` and
    `compute_loss` they compute in float32 too, and in activity regularizers,
    whose loss is float32.

    A `.keras` file keeps all this; `tfamp.load_model` loads it.
    Excepted are layers that a class of your own creates, since your code
    creates them anew: the reason says so, and the call is repeated after
    loading. Operations need no repeating.

    Out of reach are operations in a `tf.function` or a custom gradient that a
    layer calls, in `tf.raw_ops`, and in code that is neither a layer's `call`
    nor a step of the model, such as a loop of your own.

    Args:
        model: a built model: functional, sequential or subclassed, compiled
            or not. The next step of a compiled one is traced anew.
        layers: further layers to compute in float32 as a whole, with their
            sublayers: each a layer, a layer's name, its path, or a shell
            pattern that paths are matched with (`"decoder/*"`).
        outputs: whether the outputs are to be float32. An output layer with
            a bounded activation, as softmax, gets it in float32; any other
            becomes float32 as a whole, logits of few classes too, since no
            layer tells whether it is a regression. The product of more than
            65,536 weights, as over a large vocabulary, stays in 16 bits.
        operations: whether sensitive operations in the code of layers, and
            states from step to step, compute in float32; False undoes it. A
            dict adds names of `keras.ops` to the table, or takes some out:
            `{"add": [...], "remove": [...]}`.
        batch: a batch of your data, `x` or `(x, y)`, for a model that cannot
            be called on inputs of unknown size.

    Returns:
        The layers that compute in float32, in the model's order.

    Raises:
        InputError: the model is not built; a layer or pattern is not found; a
            layer is quantized; an operation is unknown; an output cannot be
            made float32 from outside, in which case the inside of the model
            is kept all the same; a layer can no longer be called, in which
            case the model is put back as it was.
    """
    if not isinstance(model, keras.Model):
        raise InputError(
            f"Expected a keras.Model, got {type(model).__name__}; for one"
            " layer set layer.dtype_policy = 'float32'."
        )
    if not sensitive_layers.is_built(model):
        raise InputError(
            f"Model {model.name!r} is not built; call it once on a batch, or"
            " model.build(input_shape), before keep_float32."
        )
    keras_internals.mark(model, "tfamp_keep_float32")
    places = [
        place
        for place in walk(model)
        if not isinstance(place.layer, keras.layers.InputLayer)
    ]
    chosen = choose(places, layers)
    kinds = resolve(operations)
    released = kinds is None and _release(model, places)
    if not any(_is_16_bit(place.layer) for place in (_root(model), *places)):
        return []
    keras_internals.mark(model, "tfamp_had_16_bits")
    former = before.remember([model, *(place.layer for place in places)])
    kept: dict[int, tuple[str | None, bool]] = {}
    if data_layers.keep_input(model):
        kept[id(model)] = (data_layers.INPUTS, True)
    for place in places:
        if any(place.layer is each for each in chosen):
            kept[id(place.layer)] = _keep_whole(place.layer)
        else:
            kept[id(place.layer)] = _keep_inside(
                place.layer, keeps_operations=kinds is not None
            )
    inside: dict[int, tuple[str, bool]] = {}
    try:
        problem = None
        if outputs:
            # First: what an output is computed by shows while all is plain.
            problem = _keep_outputs(model, places, kept, batch)
        if kinds is not None:
            inside.update(
                sensitive_layers.keep(model, places, operations, batch)
            )
            if not outputs or isinstance(problem, output_layers.CannotTrace):
                _mend_mixed(model, places, inside, operations, batch)
        if isinstance(problem, output_layers.CannotTrace):
            # Perhaps it can be called now.
            problem = _keep_outputs(model, places, kept, batch)
        if problem is not None:
            raise problem
        if outputs:
            try:
                _mend_outputs(model, places, inside, operations, batch)
            except sensitive_layers.CannotBeCalled:
                before.put_back(former)
                raise
    finally:
        # Also when an output cannot be kept: the inside has changed by then.
        both = (*kept.values(), *inside.values())
        if released or any(changed for _, changed in both):
            forget_traces(model)
    told = (
        (place, *_told(place, kept, inside))
        for place in (_root(model), *places)
    )
    return [
        Float32Layer(place.path, what, changed)
        for place, what, changed in told
        if what is not None
    ]


def _told(place: Place, kept, inside) -> tuple[str | None, bool]:
    what, changed = kept.get(id(place.layer), (None, False))
    if what is not None:
        if _is_told_by_owner(place, what):
            what = None
        else:
            what = _with_note(what, place)
    operations, is_new = inside.get(id(place.layer), (None, False))
    if operations is not None and (_is_16_bit(place.layer) or what is None):
        what = operations if what is None else f"{what}; {operations}"
        changed = changed or is_new
    return what, changed


def _root(model: keras.Model) -> Place:
    return Place(model, model, model.name, model.name, True)


def _release(model: keras.Model, places: list[Place]) -> bool:
    layers = [model, *(place.layer for place in places)]
    released = [
        undo(each)
        for each in layers
        for undo in (kept_layers.release, data_layers.release)
    ]
    return any(released)


def forget_traces(model: keras.Model) -> None:
    """Lets a compiled model trace its steps anew, its layers having changed."""
    for name in ("train_function", "test_function", "predict_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)


def _keep_outputs(model, places, kept, batch) -> InputError | None:
    """Lets outputs be float32; why that cannot be, where it cannot."""
    if not sensitive_layers.has_call(model):
        # Its parts are called by its `train_step`; they have the outputs.
        for place in sensitive_layers.parts(places):
            problem = _keep_outputs(
                place.layer, list(walk(place.layer)), kept, None
            )
            if problem is not None:
                return problem
        return None
    try:
        heads = output_layers.find_output_layers(
            model, [model, *(place.layer for place in places)], batch
        )
    except InputError as error:
        return error
    for place in places:
        if any(place.layer is each for each in heads):
            what, changed = _keep_output(place.layer)
            former_what, former_changed = kept[id(place.layer)]
            kept[id(place.layer)] = (
                what or former_what,
                changed or former_changed,
            )
    return None


def _mend_mixed(model, places, inside, operations, batch) -> None:
    """Keeps layers whose own code mixes dtypes, where that mends them."""
    models = [model]
    if not sensitive_layers.has_call(model):
        models = [each.layer for each in sensitive_layers.parts(places)]
        batch = None
    for each in models:
        # One that cannot be called on placeholders at all says nothing.
        with contextlib.suppress(sensitive_layers.CannotBeCalled):
            inside.update(sensitive_layers.mend(each, operations, batch))


def _mend_outputs(model, places, inside, operations, batch) -> None:
    if not sensitive_layers.has_call(model):
        for place in sensitive_layers.parts(places):
            parts = list(walk(place.layer))
            _mend_outputs(place.layer, parts, inside, operations, None)
        return
    inside.update(sensitive_layers.mend(model, operations, batch))
    layers = [model, *(place.layer for place in places)]
    output_layers.require_float32_outputs(model, layers, batch)


def _with_note(what: str, place: Place) -> str:
    if place.saved or _is_float32_inside(place.layer):
        return what
    return what + "; not saved, repeat keep_float32 after loading"


def _is_told_by_owner(place: Place, what: str) -> bool:
    if float32_layers.is_switched(place.owner):
        return True
    if isinstance(place.owner, (*_RECURRENT, keras.layers.StackedRNNCells)):
        of_owner = (_STATE, _STATE_AND_PRODUCTS)
        return what in (_BY_POLICY, *of_owner, heads.AROUND_PRODUCT)
    owner_is_float32 = (
        not isinstance(place.owner, keras.Model)
        and place.owner.compute_dtype == "float32"
    )
    return what == _BY_POLICY and owner_is_float32


def _keep_output(layer) -> tuple[str | None, bool]:
    """Lets a layer return float32; what was done and whether it was new."""
    if isinstance(layer, _RECURRENT) and product_dtype(layer) is not None:
        is_new = kept_layers.return_float32(layer)
        return f"output and {_state(layer)}", is_new
    if not _is_16_bit(layer):
        return _by_policy(layer)
    if isinstance(layer, keras.layers.SpectralNormalization):
        return _keep_inside(layer, keeps_operations=True)
    if isinstance(layer, _FLOAT32_INSIDE):
        return "output in float32", heads.set_float32(layer)
    return heads.keep(layer)


def _keep_whole(layer) -> tuple[str | None, bool]:
    if isinstance(layer, keras.Model):
        # What a model computes, its layers compute, and they are chosen too.
        layer.dtype_policy = "float32"
        return None, False
    return "chosen by the caller", heads.set_float32(layer)


def _keep_inside(layer, *, keeps_operations: bool) -> tuple[str | None, bool]:
    """Keeps what is sensitive in a layer, its result in 16 bits."""
    if isinstance(layer, keras.Model):
        return None, False
    if not _is_16_bit(layer):
        return _by_policy(layer)
    if isinstance(layer, _FLOAT32_INSIDE):
        return "normalization, which Keras computes in float32 inside", False
    if isinstance(layer, keras.layers.SpectralNormalization):
        # Only the wrapper, which normalizes the float32 weights; the wrapped
        # layer has a policy of its own and multiplies in 16 bits.
        layer.dtype_policy = "float32"
        return "normalization of the weights in float32", True
    if isinstance(layer, keras.layers.Normalization):
        heads.set_float32(layer)
        before.restate_constants(layer)
        return "normalization of raw inputs in float32", True
    if isinstance(layer, keras.layers.Masking):
        # It looks for the mask's value among numbers that Keras has rounded.
        if not keeps_operations:
            return None, False
        return _MASKING, kept_layers.open_door(layer)
    if isinstance(layer, _RECURRENT):
        if not keeps_operations:
            return None, False
        # The backward and the forward layer of a Bidirectional go with it.
        kept_layers.keep_state(layer, casts_back=True)
        return _state(layer), True
    what = _sensitive_step(layer)
    if what is not None:
        if float32_layers.is_switched(layer):
            return what, False
        _require_built(layer)
        if float32_layers.switch(layer):
            return what, True
        if not isinstance(layer, _ATTENTION_BY_HEADS):
            # A user's subclass computes nobody knows what, where.
            heads.set_float32(layer)
            return f"{what}, and with it the whole layer", True
        # Its softmax is a sublayer, and a place of its own.
        return None, False
    activation = _own_activation(layer)
    is_kept = isinstance(activation, Float32Activation)
    if is_kept:
        activation = activation.activation
    if activation not in _SOFTMAXES:
        return None, False
    if not is_kept:
        layer.activation = Float32Activation(activation, cast_back=True)
    name = activation.__name__
    return f"{name} in float32, the rest in 16 bits", not is_kept


def _by_policy(layer) -> tuple[str | None, bool]:
    if product_dtype(layer) is not None:
        is_recurrent = isinstance(layer, _RECURRENT)
        what = _state(layer) if is_recurrent else heads.AROUND_PRODUCT
        return what, False
    # Integer and string layers have no precision, and other names than
    # float32 are the caller's own choice.
    if layer.compute_dtype != "float32":
        return None, False
    return heads.kept(layer) or _BY_POLICY, False


def _state(layer) -> str:
    if kept_layers.has_gates(layer):
        return _STATE
    return _STATE_AND_PRODUCTS


def _sensitive_step(layer) -> str | None:
    if isinstance(layer, (*_ATTENTION_BY_HEADS, keras.layers.Attention)):
        return "attention softmax in float32, both matrix products in 16 bits"
    if isinstance(layer, keras.layers.Softmax):
        return "softmax in float32"
    if isinstance(layer, keras.layers.UnitNormalization):
        return "normalization in float32"
    return None


def _own_activation(layer):
    # A recurrent layer only shows its cell's activation, and cannot set it.
    if isinstance(layer, keras.layers.RNN):
        return None
    return getattr(layer, "activation", None)


def _require_built(layer) -> None:
    if not layer.built:
        raise InputError(
            f"Layer {layer.name!r} is not built, though its model is; call the"
            " model once on a batch before keep_float32."
        )


def _is_16_bit(layer) -> bool:
    return layer.compute_dtype in DTYPES_16


def _is_float32_inside(layer) -> bool:
    return isinstance(layer, _FLOAT32_INSIDE) and _is_16_bit(layer)
