"""What layers compute in, and what their variables are read in."""

import contextlib
from collections.abc import Iterator

import keras


@contextlib.contextmanager
def dtype_policy_replaced(
    layers: list[keras.layers.Layer], policy: keras.dtype_policies.DTypePolicy
) -> Iterator[None]:
    """Within it the layers have another dtype policy.

    The public setter would write into a `DTypePolicyMap`, which other layers
    share, and could not be undone. A layer whose kernel is integers still
    takes it so.
    """
    own = [layer._dtype_policy for layer in layers]
    for layer in layers:
        new = _of_integers(layer, policy) or policy
        object.__setattr__(layer, "_dtype_policy", new)
    try:
        with _constants_cast(layers):
            yield
    finally:
        for layer, each in zip(layers, own, strict=True):
            object.__setattr__(layer, "_dtype_policy", each)


def autocast_scope(dtype: str) -> contextlib.AbstractContextManager:
    """Within it, float variables are read in that dtype, as in a layer."""
    return keras.src.backend.common.variables.AutocastScope(dtype)


def autocast_dtype() -> str | None:
    """The dtype that float variables are read in here; None for their own."""
    scope = keras.src.backend.common.variables.get_autocast_scope()
    return scope and scope.dtype


def _of_integers(
    layer: keras.layers.Layer, policy: keras.dtype_policies.DTypePolicy
) -> keras.dtype_policies.DTypePolicy | None:
    if layer.quantization_mode in (None, "float8"):
        return None
    kind = layer.dtype_policy.name.partition("_from_")[0]
    return keras.dtype_policies.get(f"{kind}_from_{policy.name}")


@contextlib.contextmanager
def _constants_cast(layers: list[keras.layers.Layer]) -> Iterator[None]:
    """Within it constants that layers hold have their compute dtype.

    Normalization casts its mean and variance once, when they are known.
    """
    casting = [
        (layer, layer.mean, layer.variance)
        for layer in layers
        if isinstance(layer, keras.layers.Normalization)
        and getattr(layer, "mean", None) is not None
        and layer.mean.dtype != layer.compute_dtype
    ]
    for layer, *_ in casting:
        if layer.input_mean is None:
            layer.finalize_state()
        else:
            layer.build(layer._build_input_shape)
    try:
        yield
    finally:
        for layer, mean, variance in casting:
            layer.mean, layer.variance = mean, variance
