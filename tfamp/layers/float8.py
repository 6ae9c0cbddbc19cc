"""Training in 8 bits: which layers of a model multiply 8-bit numbers.

Inputs and kernels of products become E4M3, gradients E5M2, each tensor with a
scale; sums, biases, activations and what is between the products stay in the
16 bits below, weights and their updates in float32.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import keras

from tfamp import keras_internals
from tfamp.errors import InputError
from tfamp.layers import float8_counterparts, pointwise_convolution
from tfamp.precision.keep_float32 import forget_traces
from tfamp.precision.layer_paths import Place, choose, walk

SKIPS = ("first and last", "first", "last", "none")


@dataclasses.dataclass(frozen=True)
class Float8Layer:
    """A layer that multiplies 8-bit numbers.

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


def float8(
    model: keras.Model,
    layers: Sequence[str | keras.layers.Layer]
    | str
    | keras.layers.Layer
    | None = None,
    *,
    scaling: Literal["delayed", "current"] = "delayed",
    history: int = 1024,
    margin: int = 0,
    power_of_two: bool = True,
    skip: Literal["first and last", "first", "last", "none"] = "first and last",
) -> list[Float8Layer]:
    """Makes products of a model multiply 8-bit numbers.

    For a model that computes in bfloat16, as `set_precision("float8")` lets
    one be built, or "mixed_bfloat16". `Dense`, `EinsumDense` and with it the
    projections of attention, `Conv1D`, `Conv2D` and `Conv3D` of the model are
    covered; products of two activations, such as attention scores, embeddings,
    and a user's subclasses are not. Layers that compute in float32 stay.

    Inputs and kernels are E4M3, gradients E5M2. A tensor's scale follows from
    the largest magnitudes of the steps before: one step late, as published
    (Micikevicius et al., 2022); before the first one, and for a layer that is
    called several times in a step, from the tensor itself. What a scale
    leaves too large saturates at 448 and 57344. The kernel is rounded from its
    float32 value, once. Nothing depends on `training=`.

    On hardware without 8-bit products (everything but NVIDIA GPUs of compute
    capability 8.9 and above, and some others) training computes the same
    numbers, more slowly than without. To be called before the optimizer is
    built, and where it has been, before `compile`.

    Args:
        model: a built model.
        layers: names, paths, patterns or layers, as of `keep_float32`; None
            for all that are covered, but for what `skip` says.
        scaling: "delayed", or "current": each tensor by its own largest
            magnitude, at the cost of a pass over it. Each replica and
            microbatch then has its own.
        history: steps that a delayed scale looks back.
        margin: powers of two that scales leave free.
        power_of_two: scales are rounded down to powers of two, which round
            nothing; False takes them as they are, and multiplies in float32.
        skip: which of the covered layers stay, in the model's order; of no
            effect where layers were named.

    Returns:
        The layers that multiply 8-bit numbers, in the model's order.

    Raises:
        InputError: for settings or a model that cannot be used.
    """
    chosen = float8_counterparts.Settings(
        scaling, history, margin, power_of_two
    )
    if skip not in SKIPS:
        raise InputError(
            f"skip={skip!r}; expected one of {', '.join(map(repr, SKIPS))}."
        )
    _check(model)
    places = list(walk(model))
    done = [
        p for p in places if isinstance(p.layer, float8_counterparts.LAYERS)
    ]
    wanted = _wanted(places, layers, skip)
    if not wanted and not done:
        raise InputError(
            f"Model {model.name!r} has no layer to multiply 8-bit numbers: "
            "they must compute in bfloat16, which "
            "tfamp.set_precision('float8') sets before the model is built."
        )
    optimizer = getattr(model, "optimizer", None)
    if wanted and optimizer is not None and optimizer.built:
        raise InputError(
            f"The optimizer of model {model.name!r} was built for the layers "
            "as they are; call tfamp.float8 before training, or compile with "
            "a new optimizer after it."
        )
    with model.distribute_strategy.scope():
        for place in wanted:
            _replace(place, chosen)
    if wanted:
        forget_traces(model)
    changed = {id(place.layer) for place in wanted}
    return [
        Float8Layer(
            place.path, _reason(place), changed=id(place.layer) in changed
        )
        for place in places
        if isinstance(place.layer, float8_counterparts.LAYERS)
    ]


def covered_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers that `float8` takes by itself where all are in 16 bits."""
    places = _products(list(walk(model)), "first and last")
    return [
        place.layer
        for place in places
        if isinstance(place.layer, float8_counterparts.LAYERS)
        or _obstacle(place.layer, of_any_dtype=True) is None
    ]


@contextlib.contextmanager
def multiplying_8_bits(
    layers: Sequence[keras.layers.Layer],
) -> Iterator[None]:
    """Within it, layers multiply 8-bit numbers where they compute in 16 bits.

    On trial: each tensor has a scale of its own. Layers that `float8` has
    taken already go on with what they have.
    """
    tried = [layer for layer in layers if type(layer) in _FLOAT8]
    before = [type(layer) for layer in tried]
    added = {
        "float8_settings": float8_counterparts.Settings("current"),
        "float8_histories": [],
    }
    try:
        for layer in tried:
            # Past Keras's own __setattr__, which tracks what it is given.
            vars(layer).update(added)
            layer.__class__ = _FLOAT8[type(layer)]
        yield
    finally:
        for layer, cls in zip(tried, before, strict=True):
            layer.__class__ = cls
            for name in added:
                vars(layer).pop(name, None)


def call_of(layer: keras.layers.Layer, call: Callable) -> Callable:
    """What calls a layer, where `call` was its method before a trial."""
    if isinstance(layer, float8_counterparts.LAYERS):
        return type(layer).call.__get__(layer)
    return call


_FLOAT8 = {
    keras.layers.Dense: float8_counterparts.Dense,
    keras.layers.EinsumDense: float8_counterparts.EinsumDense,
    keras.layers.Conv1D: float8_counterparts.Conv1D,
    keras.layers.Conv2D: float8_counterparts.Conv2D,
    keras.layers.Conv3D: float8_counterparts.Conv3D,
    pointwise_convolution.Conv2D: float8_counterparts.Conv2D,
}


def _check(model: keras.Model) -> None:
    if not isinstance(model, keras.Model):
        raise InputError(
            f"Expected a keras.Model, got {type(model).__name__}; put the"
            " layer into a model."
        )
    if not model.built:
        raise InputError(
            f"Model {model.name!r} is not built; call it once on a batch, or"
            " model.build(input_shape), before float8."
        )


def _wanted(places: list[Place], layers, skip: str) -> list[Place]:
    """The layers to replace."""
    if layers is None:
        products = _products(places, skip)
        return [place for place in products if _obstacle(place.layer) is None]
    named = choose(places, layers)
    wanted = []
    for place in places:
        if not any(place.layer is each for each in named):
            continue
        if isinstance(place.layer, float8_counterparts.LAYERS):
            continue
        obstacle = _obstacle(place.layer)
        if obstacle is None:
            wanted.append(place)
        elif not keras_internals.sublayers(place.layer) and (
            place.layer.weights and type(place.layer) in _FLOAT8
        ):
            raise InputError(
                f"Layer {place.path} cannot multiply 8-bit numbers: {obstacle}."
            )
    return wanted


def _products(places: list[Place], skip: str) -> list[Place]:
    """The layers of covered kinds, but for those to skip."""
    products = [
        place
        for place in places
        if type(place.layer) in _FLOAT8
        or isinstance(place.layer, float8_counterparts.LAYERS)
    ]
    first = 1 if skip.startswith("first") else 0
    last = len(products) - (1 if skip.endswith("last") else 0)
    return products[first:last]


def _obstacle(
    layer: keras.layers.Layer, of_any_dtype: bool = False
) -> str | None:
    """Why a layer stays as it is; None for one that can be replaced."""
    # Not isinstance: what a user's subclass computes is unknown.
    if type(layer) not in _FLOAT8:
        return f"{type(layer).__name__} is not covered"
    if not layer.built:
        return "it is not built"
    is_narrow = layer.compute_dtype in ("bfloat16", "float16")
    if not (is_narrow or of_any_dtype):
        return f"it computes in {layer.compute_dtype}"
    if layer.lora_enabled:
        return "it has low-rank weights"
    if getattr(layer, "quantization_mode", None):
        return f"it is quantized to {layer.quantization_mode}"
    return None


def _replace(place: Place, chosen: float8_counterparts.Settings) -> None:
    """Turns a layer in place into its counterpart; the object stays."""
    layer = place.layer
    layer.__class__ = _FLOAT8[type(layer)]
    layer.float8_settings = chosen
    layer.float8_saved = place.saved
    layer.add_histories()


def _reason(place: Place) -> str:
    scaling = place.layer.float8_settings.scaling
    text = f"8-bit products, {scaling} scales"
    if place.saved:
        return text
    return text + "; not saved, repeat float8 after loading"
