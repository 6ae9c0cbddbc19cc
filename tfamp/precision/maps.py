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


def is_map(name: Any) -> bool:
    """Whether a precision is named by a file."""
    return isinstance(name, os.PathLike) or str(name).endswith(".json")


def load_map(
    path: str | os.PathLike,
) -> "tuple[str, keras.dtype_policies.DTypePolicyMap]":
    """The precision of most layers, and the policy of each.

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
    return precision, policies
