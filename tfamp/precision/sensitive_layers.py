"""Finding the layers that run sensitive operations in 16 bits.

The model is called on placeholders as if all of it were kept, and each layer
is noted in which float32 made a difference to an operation.
"""

from collections.abc import Mapping, Sequence

import keras
from absl import logging

from tfamp import keras_internals
from tfamp.errors import InputError
from tfamp.precision import (
    autocast,
    before,
    data_layers,
    kept_layers,
    output_layers,
    raw_data,
    regions,
)
from tfamp.precision.layer_paths import Place, walk
from tfamp.precision.operations import resolve

# Keras computes the first in float32 and rounds the result once, as the end of
# its layer does; what it compares is whole numbers.
_FLOAT32_IN_KERAS = frozenset(
    {"mean", "std", "var", "equal", "not_equal", "cast"}
)


# Of Keras's normalizations the others take their inputs as they come.
_ROUND_THEIR_INPUTS = (keras.layers.BatchNormalization,)


class CannotBeCalled(InputError):
    """A model that could be called before cannot be called after."""


def find(
    model: keras.Model, kinds: Mapping[str, str], batch=None
) -> regions.Seen | None:
    """Returns what a call with all operations kept shows.

    Returns:
        None if the model cannot be called on placeholders at all. If
        `.failed` is a layer, it is that layer's code that keeping breaks.
    """
    seen, error = call(model, kinds, batch)
    if error is not None and seen.failed is not None:
        _, error_without = call(model, None, batch)
        if error_without is None:
            return seen
    return None if error is not None else seen


def call(
    model: keras.Model, kinds: Mapping[str, str] | None, batch=None
) -> tuple[regions.Seen, Exception | None]:
    """Calls a model on placeholders, in inference and in training.

    Returns:
        What was seen, and what the last try raised.
    """
    known = frozenset({id(model), *(id(each.layer) for each in walk(model))})
    seen, problem = regions.Seen(known=known), None
    try:
        arguments = output_layers.placeholders(model, batch)
    except InputError as error:
        return seen, error
    for args, kwargs in arguments:
        seen, problem = regions.Seen(known=known), None
        for training in (False, True):

            def run(args, kwargs, seen=seen, training=training):
                region = regions.Region(model, None, kinds, seen)
                if kinds is not None:
                    raw_data.mark_inputs((args, kwargs))
                with autocast.entered(region):
                    result = model(*args, **kwargs, training=training)
                raw_data.see_outputs(seen, result)

            try:
                keras_internals.run_symbolically(run, args, kwargs)
            # The model's own code runs here, and may raise anything.
            except Exception as error:
                problem = error
                break
        if problem is None:
            break
    return seen, problem


def needs(layer: keras.layers.Layer, names: set[str]) -> bool:
    """Whether float32 changes what a layer returns."""
    return bool(names - _FLOAT32_IN_KERAS) or (
        bool(names) and is_of_users(layer)
    )


def is_of_users(layer: keras.layers.Layer) -> bool:
    """Whether the code of a layer is neither Keras's nor ours."""
    package = kept_layers.class_of(layer).__module__.partition(".")[0]
    return package not in ("keras", "tfamp")


def has_call(layer: keras.layers.Layer) -> bool:
    """Whether it can be called; a GAN, whose parts are, often cannot."""
    own = kept_layers.class_of(layer).call
    return own not in (keras.Model.call, keras.layers.Layer.call)


def is_built(model: keras.Model) -> bool:
    """Whether a model is built, or all parts of one that has no `call`."""
    if model.built or has_call(model):
        return model.built
    inner = [place.layer for place in walk(model)]
    return bool(inner) and all(each.built for each in inner)


def keep(
    model: keras.Model,
    places: Sequence[Place],
    operations: kept_layers.Operations,
    batch=None,
) -> dict[int, tuple[str, bool]]:
    """Keeps the layers that run sensitive operations in 16 bits.

    And the steps that the model overrides, whose code is outside of any layer.

    Returns:
        By the layer's id, what of it computes in float32, and whether that is
        new.
    """
    kept = _keep_layers(model, places, operations, batch)
    beside = {
        id(place.layer): (place.layer, "activity regularizer in float32")
        for place in places
        if place.layer.activity_regularizer is not None
    }
    steps = kept_layers.own_steps(model)
    if steps and is_of_users(model):
        told = f"sensitive operations in float32 in its {', '.join(steps)}"
        beside[id(model)] = (model, told)
    for key, (layer, told) in beside.items():
        if _is_16_bit(layer):
            what, new = kept.get(key, ("", False))
            new = kept_layers.keep_beside_call(layer, operations) or new
            kept[key] = (f"{what}; {told}" if what else told, new)
    return kept


def _keep_layers(
    model, places, operations, batch=None
) -> dict[int, tuple[str, bool]]:
    kept: dict[int, tuple[str, bool]] = {}
    if not has_call(model):
        for place in parts(places):
            inner = list(walk(place.layer))
            kept.update(_keep_layers(place.layer, inner, operations))
        return kept
    seen = _leave_what_breaks(model, resolve(operations), batch)
    layers = {id(model): model, **{id(p.layer): p.layer for p in places}}
    if seen is None:
        names: dict[int, list[str] | None] = {
            key: None
            for key, layer in layers.items()
            if _is_16_bit(layer) and _runs_code_of_users(layer)
        }
    else:
        names = {
            key: sorted(found)
            for key, found in seen.operations.items()
            if key in layers and needs(layers[key], found)
        }
    for key, found in names.items():
        layer = layers[key]
        if found is None:
            what = "sensitive operations in float32, wherever its code has them"
        else:
            what = f"{', '.join(found)} in float32, products in 16 bits"
        kept[key] = (what, kept_layers.keep(layer, operations))
    for place in places:
        if id(place.layer) in kept:
            _keep_owners(place, places, operations)
    if seen is not None:
        for key, layer in layers.items():
            if seen.take_wide.get(key) and data_layers.keep_input(layer):
                kept[key] = (data_layers.INPUTS, True)
        for layer in raw_data.carriers([*layers.values()], seen):
            if _is_16_bit(layer):
                kept[id(layer)] = (
                    data_layers.AS_THEY_COME,
                    data_layers.keep(layer),
                )
    for layer in layers.values():
        if _needs_open_door(layer, seen):
            what, new = kept.get(id(layer), ("", False))
            new = kept_layers.open_door(layer, operations) or new
            told = "float inputs reach it as they come"
            kept[id(layer)] = (f"{what}; {told}" if what else told, new)
    return kept


def mend(
    model: keras.Model, operations: kept_layers.Operations, batch=None
) -> dict[int, tuple[str, bool]]:
    """Keeps layers that mix dtypes, by themselves or since others are float32.

    Returns:
        As `keep`.

    Raises:
        CannotBeCalled: that does not help, and nothing was changed; the line
            names the layer and the cause.
    """
    kept: dict[int, tuple[str, bool]] = {}
    former = []
    while True:
        seen, error = call(model, None, batch)
        if error is None:
            return kept
        layer = seen.failed
        former += before.remember([] if layer is None else [layer])
        if (
            layer is None
            or operations is False
            or not _is_16_bit(layer)
            or not kept_layers.keep(layer, operations)
        ):
            before.put_back(former)
            name = model.name if layer is None else layer.name
            raise CannotBeCalled(
                f"Layer {name!r} cannot be called with what keep_float32"
                f" makes float32 ({output_layers.said(error)}); the model is"
                " as it was. Cast to one dtype there, or pass outputs=False."
            )
        kept[id(layer)] = ("mixed dtypes in float32", True)


def _leave_what_breaks(model, kinds, batch) -> regions.Seen | None:
    """The call of a model in which every layer is kept that can be."""
    left: list[keras.layers.Layer] = []
    while True:
        seen = find(model, kinds, batch)
        if seen is None or seen.failed is None:
            return seen
        if any(seen.failed is each for each in left):
            return None
        left.append(seen.failed)
        kept_layers.keep(seen.failed, operations=False)
        logging.warning(
            "keep_float32 leaves the operations of layer %r in 16 bits: its"
            " code cannot be called with them in float32.",
            seen.failed.name,
        )


def _keep_owners(place: Place, places, operations) -> None:
    """Keeps the layers around, whose code makes the layer anew when loaded."""
    by_layer = {id(each.layer): each for each in places}
    owner = place.owner
    while owner is not None:
        if (
            is_of_users(owner)
            and _is_16_bit(owner)
            and has_call(owner)
            and not kept_layers.is_kept(owner)
        ):
            kept_layers.keep(owner, operations)
        around = by_layer.get(id(owner))
        owner = None if around is None else around.owner


def _needs_open_door(
    layer: keras.layers.Layer, seen: regions.Seen | None
) -> bool:
    """Whether the 16 bits of its inputs would reach more than products."""
    if kept_layers.is_open(layer):
        return True
    if not (layer.autocast and _is_16_bit(layer)):
        return False
    if not (is_of_users(layer) or isinstance(layer, _ROUND_THEIR_INPUTS)):
        return False
    if seen is not None and raw_data.needs_open_door(layer, seen):
        return True
    return kept_layers.is_kept(layer) or (
        isinstance(layer, keras.Model)
        and has_call(layer)
        and any(
            not each.autocast or not _is_16_bit(each)
            for each in keras_internals.sublayers(layer)
        )
    )


def parts(places: Sequence[Place]) -> list[Place]:
    """The outermost models that can be called."""
    models = [
        place
        for place in places
        if isinstance(place.layer, keras.Model)
        and place.layer.built
        and has_call(place.layer)
    ]
    ids = {id(place.layer) for place in models}
    return [place for place in models if id(place.owner) not in ids]


def _runs_code_of_users(layer) -> bool:
    return has_call(layer) and (
        is_of_users(layer) or isinstance(layer, keras.layers.Lambda)
    )


def _is_16_bit(layer) -> bool:
    return layer.compute_dtype in ("bfloat16", "float16")
