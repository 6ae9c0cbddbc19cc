"""Precision names, and the Keras dtype policy that each stands for.

The names live here and nowhere else. Keras calls its policies the same, so
that a name can be handed to `dtype=` of a single layer as well.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tfamp.errors import InputError, did_you_mean
from tfamp.precision.maps import is_map, load_map

if TYPE_CHECKING:
    import keras

# What `set_precision` set last.
_last_precision: str | None = None

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
# Products of 8-bit numbers, where `tfamp.float8` put them into a model; all
# else computes as the policy says that Keras knows.
FLOAT8 = "float8"
_BELOW_FLOAT8 = "mixed_bfloat16"
AUTO = "auto"
# What other libraries call them.
_ALIASES = {
    "fp32": "float32",
    "32-true": "float32",
    "bf16": "mixed_bfloat16",
    "bf16-mixed": "mixed_bfloat16",
    "fp16": "mixed_float16",
    "16-mixed": "mixed_float16",
}


def resolve_precision(name: str = AUTO) -> str:
    """Returns the precision a name stands for on this machine.

    Args:
        name: one of `PRECISIONS`, "auto" (what `tfamp.recommend` says), or
            what other libraries call one: "fp16", "16-mixed", "bf16",
            "bf16-mixed", "fp32", "32-true"; or the `tune.json` of
            `tfamp.tune`.

    Raises:
        InputError: the name is unknown, or the hardware lacks the format.
    """
    if is_map(name):
        return _resolve(load_map(name)[0])
    return _resolve(name)


def _resolve(name: str) -> str:
    if name == AUTO:
        from tfamp.hardware.devices import recommend

        return recommend().precision
    name = canonical(name)
    if name not in (*PRECISIONS, FLOAT8):
        allowed = (AUTO, *PRECISIONS, FLOAT8)
        raise InputError(
            f"Unknown precision {name!r}; expected one of {', '.join(allowed)}."
            + did_you_mean(_meant(str(name)), allowed)
        )
    if name == "mixed_float16":
        _require_no_tpu()
    return name


def canonical(name: str) -> str:
    """The name of a precision that another library calls otherwise."""
    return _ALIASES.get(name, name)


def _meant(name: str) -> str:
    """The precision that has the bits in a name; the name where it has none.

    float16 is meant to be mixed_float16, and is spelled more like float8.
    """
    plain = name.lower()
    if "bf" in plain or "bfloat" in plain:
        return "mixed_bfloat16"
    for bits, precision in (
        (("16", "half"), "mixed_float16"),
        (("32", "full", "single"), "float32"),
        (("8",), FLOAT8),
    ):
        if any(each in plain for each in bits):
            return precision
    return name


def check_compared(names: Sequence[str], takes_maps: bool = False) -> None:
    """Raises `InputError` for precisions that cannot stand side by side.

    Args:
        names: the precisions.
        takes_maps: whether the `tune.json` of `tfamp tune` may be one.
    """
    for name in names:
        resolve_precision(name)
        if name == AUTO or (is_map(name) and not takes_maps):
            raise InputError(
                f"Precision {name!r} cannot be compared; expected some of "
                f"{', '.join((*PRECISIONS, FLOAT8))}."
            )
        if names.count(name) > 1:
            raise InputError(f"Precision {name!r} is named twice.")


def set_precision(name: str = AUTO) -> str:
    """Sets the precision of every layer built from now on.

    The mixed precisions compute in 16 bits and keep variables, and with them
    the optimizer's moments, in float32 (Micikevicius et al., 2018, "Mixed
    Precision Training", section 3.1). Layers that exist keep theirs.

    Args:
        name: "float32", "mixed_bfloat16", "mixed_float16", "float8", or
            "auto". With "float8" layers compute in bfloat16, and `tfamp.fit`
            calls `tfamp.float8(model)` where that was left out. Or the path
            of a `tune.json`, by which each layer gets its own: in a model
            with the names of the one that was tuned.

    Returns:
        The precision that was set; never "auto". Of a map, that of the layers
        that are not in float32.

    Raises:
        InputError: the name is unknown, or the hardware lacks the format.
    """
    import keras

    from tfamp.keras_internals import mark_session

    global _last_precision
    precision = resolve_precision(name)
    keras.config.set_dtype_policy(
        load_map(name)[1] if is_map(name) else policy_name(precision)
    )
    mark_session(precision)
    _last_precision = precision
    return precision


def last_precision() -> str | None:
    """What `set_precision` set last, whatever undid it since."""
    return _last_precision


def forget_precision() -> None:
    """Makes `last_precision` None."""
    global _last_precision
    _last_precision = None


@contextlib.contextmanager
def precision_scope(name: str = AUTO) -> Iterator[str]:
    """Sets the precision inside a `with` block, and restores the former one.

    Args:
        name: as in `set_precision`.

    Yields:
        The precision that was set; never "auto".

    Raises:
        InputError: the name is unknown, or the hardware lacks the format.
    """
    import keras

    global _last_precision
    former, former_precision = keras.config.dtype_policy(), _last_precision
    precision = set_precision(name)
    try:
        yield precision
    finally:
        keras.config.set_dtype_policy(former)
        _last_precision = former_precision


def precision_of(model: "keras.Model") -> str:
    """Returns the precision that a model's layers compute in.

    Each layer is asked for its own compute dtype, so that per-layer policies
    and a `DTypePolicyMap` count. A model's policy does not: its layers may
    have been built under another one. A layer whose products alone have 16
    bits counts as one of 16 bits.

    Args:
        model: any Keras model. Layers that only building creates are unknown
            before it.

    Returns:
        "mixed_float16" if any layer computes in float16, since its gradients
        then need loss scaling, whatever the other layers do; else "float8"
        if any multiplies 8-bit numbers; else "mixed_bfloat16" if any computes
        in bfloat16; else "float32".
    """
    from tfamp.keras_internals import all_layers

    compute_dtypes = _compute_dtypes(model)
    if "float16" in compute_dtypes:
        return "mixed_float16"
    if "bfloat16" not in compute_dtypes:
        return "float32"
    is_float8 = any(
        hasattr(each, "float8_settings") for each in all_layers(model)
    )
    return FLOAT8 if is_float8 else "mixed_bfloat16"


def policy_name(precision: str) -> str:
    """The dtype policy of a precision, as Keras calls it."""
    return _BELOW_FLOAT8 if precision == FLOAT8 else precision


def compute_dtype_of(precision: str) -> str:
    """What the layers of a precision compute in, between 8-bit products."""
    return policy_name(precision).removeprefix("mixed_")


def _compute_dtypes(layer: "keras.layers.Layer") -> set[str | None]:
    import keras

    from tfamp.keras_internals import sublayers
    from tfamp.precision.product_policy import product_dtype

    children = sublayers(layer)
    dtypes = set().union(*map(_compute_dtypes, children))
    is_container = isinstance(layer, keras.Model) and children
    # An input layer computes nothing, and has the global policy.
    if not (is_container or isinstance(layer, keras.layers.InputLayer)):
        dtypes.add(layer.compute_dtype)
        dtypes.add(product_dtype(layer))
    return dtypes


def _require_no_tpu() -> None:
    from tfamp.hardware.devices import detect_hardware

    if detect_hardware().kind == "tpu":
        raise InputError(
            "Precision 'mixed_float16' does not run on a TPU, whose matrix"
            " units take bfloat16; use 'mixed_bfloat16', which needs no loss"
            " scaling."
        )
