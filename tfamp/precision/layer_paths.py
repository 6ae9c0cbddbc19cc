"""Layers of a model by path: finding all, and choosing some."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence

import keras

from tfamp import keras_internals
from tfamp.errors import InputError


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer and where in a model it is.

    Attributes:
        layer: the layer.
        owner: the layer or model that holds it.
        path: the names from the outermost layer to this one, joined by "/".
            Unlike `layer.path` it exists for layers without weights too, and
            tells the layers of two nested models apart: where one layer holds
            several of one name, "#2" and so on follow it.
        names: the same without that.
        saved: whether a `.keras` file describes the layer itself. It does not
            where the owner's own code creates the layer.
    """

    layer: keras.layers.Layer
    owner: keras.layers.Layer
    path: str
    names: str
    saved: bool


def walk(layer: keras.layers.Layer) -> Iterator[Place]:
    """Yields all layers in a layer or model, each once, outer before inner."""
    yield from _walk(layer, "", "", True, set())


def choose(
    places: Iterable[Place],
    wanted: str | keras.layers.Layer | Sequence[str | keras.layers.Layer],
) -> list[keras.layers.Layer]:
    """Returns the layers that were asked for.

    Args:
        places: the layers to choose from.
        wanted: one or several of: a layer, a layer's name, its path, or a
            shell pattern that paths are matched with (`"decoder/*"`). A
            nested model stands for itself and all layers in it.

    Raises:
        InputError: nothing is, or matches, one of `wanted`.
    """
    places = list(places)
    if isinstance(wanted, (str, keras.layers.Layer)):
        wanted = (wanted,)
    chosen = []
    for each in wanted:
        found = [place.layer for place in places if _matches(place, each)]
        if not found:
            raise InputError(_not_found(each, places))
        chosen.extend(found)
        for layer in found:
            if isinstance(layer, keras.Model):
                chosen.extend(place.layer for place in walk(layer))
    return chosen


def _walk(
    layer, prefix: str, names: str, saved: bool, seen: set[int]
) -> Iterator[Place]:
    saved = saved and _describes_its_layers(layer)
    taken: set[str] = set()
    for sublayer in keras_internals.sublayers(layer):
        if id(sublayer) not in seen:
            seen.add(id(sublayer))
            path = f"{prefix}{_numbered(sublayer.name, taken)}"
            name = f"{names}{sublayer.name}"
            yield Place(sublayer, layer, path, name, saved)
            yield from _walk(sublayer, f"{path}/", f"{name}/", saved, seen)


def _numbered(name: str, taken: set[str]) -> str:
    """The name, with a number if another has it."""
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}#{number}"
    taken.add(unique)
    return unique


def _describes_its_layers(layer) -> bool:
    attention = (
        keras.layers.GroupQueryAttention,
        keras.layers.MultiHeadAttention,
    )
    by_keras = type(layer).__module__.partition(".")[0] == "keras"
    return by_keras and not isinstance(layer, attention)


def _matches(place: Place, wanted) -> bool:
    if not isinstance(wanted, str):
        return place.layer is wanted
    return wanted == place.layer.name or any(
        fnmatch.fnmatchcase(path, wanted) for path in (place.path, place.names)
    )


def _not_found(wanted, places) -> str:
    is_text = isinstance(wanted, str)
    name = wanted if is_text else getattr(wanted, "name", wanted)
    paths = [place.path for place in places]
    near = difflib.get_close_matches(str(name), paths, n=3, cutoff=0.0)
    return (
        f"No layer of the model is or matches {name!r}; the nearest paths are"
        f" {', '.join(near)}."
    )
