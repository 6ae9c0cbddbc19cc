"""What a `.keras` file says of precision, said of another.

A file names a dtype policy for each layer and the numbers of the loss scale.
Weights are in float32 whatever the precision, or in 16 bits, which float32
holds exactly, so that nothing else of it depends on that.
"""

import io
import json
import os
import zipfile
from typing import Any, BinaryIO

import keras

from tfamp.errors import InputError
from tfamp.precision.policy import PRECISIONS

_CONFIG = "config.json"
_OURS = "tfamp>LossScaleOptimizer"
_MIXED = tuple(name for name in PRECISIONS if name != "float32")
_DTYPES_16 = tuple(name.removeprefix("mixed_") for name in _MIXED)
# As `wrap_optimizer` makes it without 16-bit gradients.
_FIXED_SCALE = {"dynamic": False, "initial_scale": 1.0}


def recast(
    path: str | os.PathLike, precision: str, initial_scale: float
) -> BinaryIO:
    """A `.keras` file, in memory, that says of each layer another precision.

    Layers that the file has in float32 stay so where others are in 16 bits:
    somebody chose it. Where all are in float32, each is given what its class
    takes where no dtype is said: the precision, or float32 by its own choice.
    Weights stored in 16 bits, as frozen ones, stay so where the file has mixed
    layers too and the bits are those of the precision; they would lose some of
    theirs in the other 16 bits, and become float32 anywhere else.

    Args:
        path: the file.
        precision: of `PRECISIONS`.
        initial_scale: of a dynamic loss scale, where the precision has one.

    Raises:
        InputError: it holds layers in a precision of another kind, such as
            float64 or float8.
    """
    target = io.BytesIO()
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(target, "w") as copy,
    ):
        for item in source.infolist():
            content = source.read(item)
            if item.filename == _CONFIG:
                config = json.loads(content)
                _rewrite(config, path, precision, initial_scale)
                content = json.dumps(config).encode()
            copy.writestr(item, content)
    target.seek(0)
    return target


def _rewrite(config, path, precision, initial_scale):
    policies = [each["config"] for each in _objects(config) if _is_policy(each)]
    maps = [
        each["config"]
        for each in _objects(config)
        if each.get("class_name") == "DTypePolicyMap"
    ]
    # Layers whose products alone have 16 bits say so beside their policy.
    around = [
        (each, key)
        for each in _objects(config)
        for key in ("former", "former_policy")
        if each.get(key) in _MIXED
    ]
    names = {policy["name"] for policy in policies}
    names |= {each[key] for each, key in around}
    for each in maps:
        names |= {_name(each["default_policy"])}
        names |= {_name(policy) for policy in each["policy_map"].values()}
    # Keras's dtype of a layer without a dtype, such as of strings.
    known = {*PRECISIONS, *_DTYPES_16}
    other = names - {*known, None, "string", "int32", "int64", "bool"}
    if other:
        raise InputError(
            f"{os.fspath(path)!r} has layers in {', '.join(sorted(other))}; "
            f"only a model in {', '.join([*PRECISIONS, *_DTYPES_16])} can be "
            "loaded in another precision."
        )
    replaced = names & {*_MIXED, *_DTYPES_16} or {"float32"}
    if precision in _MIXED and precision in names:
        # Whoever mixed them chose how the others are stored.
        replaced -= {precision.removeprefix("mixed_")}

    def renamed(name):
        return precision if name in replaced else name

    if replaced == {"float32"} and precision in _MIXED:
        _leave_out_float32(config)
    for policy in policies:
        policy["name"] = renamed(policy["name"])
    for each, key in around:
        each[key] = renamed(each[key])
        if each.get("returns"):
            each["returns"] = each[key].removeprefix("mixed_")
    for each in maps:
        # Policies that are objects were among those above.
        if isinstance(each["default_policy"], str):
            each["default_policy"] = renamed(each["default_policy"])
        each["policy_map"] = {
            layer: renamed(policy) if isinstance(policy, str) else policy
            for layer, policy in each["policy_map"].items()
        }
    _rename_beside(config.get("config"), precision.removeprefix("mixed_"))
    if precision == "mixed_float16":
        _wrap_optimizer(config.get("compile_config"), initial_scale)
    if replaced == {precision}:
        return
    # A model that trains itself holds its optimizers.
    for each in _objects(config):
        if each.get("registered_name") == _OURS:
            each["config"] |= (
                {"dynamic": True, "initial_scale": initial_scale}
                if precision == "mixed_float16"
                else _FIXED_SCALE
            )


def _leave_out_float32(config: Any) -> None:
    """Has layers take what they take where nobody says a dtype."""
    for each in _objects(config):
        settings = each.get("config")
        if not isinstance(settings, dict):
            continue
        dtype = settings.get("dtype")
        if _is_policy(dtype) and _name(dtype) == "float32":
            del settings["dtype"]


def _is_policy(value: Any) -> bool:
    return isinstance(value, dict) and value.get("class_name") == "DTypePolicy"


def _rename_beside(model: Any, dtype: str) -> None:
    """16 bits that stand beside a policy, in inputs, casts and embeddings."""
    for each in _objects(model):
        for key, value in each.items():
            if key.endswith("dtype") and value in _DTYPES_16:
                each[key] = dtype


def _wrap_optimizer(compiled: Any, initial_scale: float) -> None:
    """Has ours made where Keras would put its own scaler, and lose moments."""
    compiled = compiled or {}
    if not compiled.get("auto_scale_loss", True):
        return
    optimizer = compiled.get("optimizer")
    if isinstance(optimizer, str):
        optimizer = keras.saving.serialize_keras_object(
            keras.optimizers.get(optimizer)
        )
    if not optimizer or optimizer["class_name"] == "LossScaleOptimizer":
        return
    compiled["optimizer"] = {
        "module": "tfamp.scaling.optimizer",
        "class_name": "LossScaleOptimizer",
        "registered_name": _OURS,
        "config": {
            "inner_optimizer": optimizer,
            "initial_scale": initial_scale,
        },
    }


def _objects(value: Any):
    """All dicts in it, the outer ones first."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _objects(each)


def _name(policy: Any) -> Any:
    """Of a policy that may be written as its name alone."""
    return policy["config"]["name"] if isinstance(policy, dict) else policy
