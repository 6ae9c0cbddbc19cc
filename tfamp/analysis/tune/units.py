"""What is switched between precisions together: mostly a layer.

A layer of Keras is one with all that is in it (an attention's projections, the
cell of a recurrent layer). So is a layer without layers. A layer or model of
somebody that holds others has computations of its own beside them: it is
switched by itself, and so are those, down to `_DEPTH` such layers in each
other; what lies deeper is switched as a whole. So is a layer whose own code
cannot take two precisions, as `x + self.inner(x)` cannot.
"""

import dataclasses
from collections.abc import Collection

import keras

from tfamp import keras_internals
from tfamp.precision.layer_paths import walk

# The graph doubles with each of them.
_DEPTH = 2
_DTYPES_16 = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """What is switched together.

    Attributes:
        path: of the layer, as `tfamp.keep_float32` takes it; a model's name
            for the model itself.
        layer: what is called.
        layers: those whose policy changes.
        inside: the layer and all in it.
        pathless: paths, of the same kind, of those of `layers` that Keras
            gives none, as it gives none to what has no weights.
    """

    path: str
    layer: keras.layers.Layer
    layers: tuple[keras.layers.Layer, ...]
    inside: tuple[keras.layers.Layer, ...]
    pathless: tuple[str, ...] = ()

    @property
    def policy_paths(self) -> list[str]:
        """How a `DTypePolicyMap` knows the layers; some it does not reach."""
        paths = (layer.path for layer in self.layers if layer.path)
        return list(dict.fromkeys(paths))


def units_of(model: keras.Model, whole: Collection[type] = ()) -> list[Unit]:
    """The units of a built model, in the order of its layers.

    Layers that compute in float32 though others of the model compute in 16
    bits are in none: they were put there.

    Args:
        model: the model.
        whole: classes of layers that are switched with all that is in them.
    """
    kept = kept_layers(model)
    places = [("", model), *((p.path, p.layer) for p in walk(model))]
    paths = {id(each): own_path for own_path, each in places}
    units: list[Unit] = []
    taken: set[int] = set()
    for path, layer in places:
        if id(layer) in taken or isinstance(layer, keras.layers.InputLayer):
            continue
        inside = [layer, *(place.layer for place in walk(layer))]
        depth = sum(any(layer is i for i in u.inside) for u in units)
        if _is_graph(layer):
            # It computes nothing that its layers do not.
            continue
        is_whole = (
            len(inside) == 1
            or depth >= _DEPTH
            or type(layer) in whole
            or type(layer).__module__.partition(".")[0] == "keras"
        )
        layers = inside if is_whole else [layer]
        taken.update(id(each) for each in layers)
        own = tuple(each for each in layers if id(each) not in kept)
        if own:
            pathless = [paths[id(each)] for each in own if not each.path]
            units.append(
                Unit(
                    path or model.name,
                    layer,
                    own,
                    tuple(inside),
                    tuple(each for each in pathless if each),
                )
            )
    return units


def kept_layers(model: keras.Model) -> dict[int, keras.layers.Layer]:
    """By id: what is in float32 in a model of which other layers are not."""
    layers = keras_internals.all_layers(model)
    if not any(layer.compute_dtype in _DTYPES_16 for layer in layers):
        return {}
    return {
        id(layer): layer for layer in layers if layer.compute_dtype == "float32"
    }


def _is_graph(layer: keras.layers.Layer) -> bool:
    if not isinstance(layer, keras.Model):
        return False
    return isinstance(layer, keras.Sequential) or hasattr(layer, "operations")
