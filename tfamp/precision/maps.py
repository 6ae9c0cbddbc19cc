"""Precisions layer by layer, as `tfamp tune` and `tfamp probe` save them."""

import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

from tfamp.errors import InputError

if TYPE_CHECKING:
    import keras

# Schema -> where it says the precision of the layers that are in 16 bits.
_SCHEMAS = {
    "tfamp.tune/1": "precision",
    "tfamp.probe/1": "recommended_precision",
}


# What a map does not reach, as an attribute of it.
_PATHLESS = "_tfamp_pathless"


def is_map(name: Any) -> bool:
    """Whether a precision is named by a file."""
    return isinstance(name, os.PathLike) or str(name).endswith(".json")


def load_map(
    path: str | os.PathLike,
) -> "tuple[str, keras.dtype_policies.DTypePolicyMap]":
    """The precision of most layers, and the policy of each.

    Some layers have no path by which the map knows them: `reach_pathless`
    finds them in a model that was built under it.

    Args:
        path: of `tune.json` or `probe.json`.

    Raises:
        InputError: there is no such file, or it is another one.
    """
    import keras

    path = pathlib.Path(path).expanduser()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"Precision map {str(path)!r} cannot be read ({error}); expected "
            "the tune.json of `tfamp tune` or the probe.json of `tfamp probe`."
        ) from None
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema not in _SCHEMAS:
        raise InputError(
            f"Precision map {str(path)!r} has schema {schema!r}; expected "
            f"one of {', '.join(_SCHEMAS)}."
        )
    try:
        precision = record[_SCHEMAS[schema]]
        policies = keras.dtype_policies.deserialize(record["dtype_policy_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"Precision map {str(path)!r} is damaged ({error}); run its "
            "command again."
        ) from None
    vars(policies)[_PATHLESS] = frozenset(record.get("pathless_layers", ()))
    return precision, policies


def reach_pathless(model: "keras.Model") -> None:
    """Puts to float32 what a map says of layers to which Keras gives no path.

    Those are layers without weights, such as ReLU and Dropout.
    """
    from tfamp.precision.layer_paths import walk

    for place in walk(model):
        layer = place.layer
        wanted = vars(layer.dtype_policy).get(_PATHLESS, ())
        if place.path in wanted and not layer.path:
            layer.dtype_policy = "float32"
