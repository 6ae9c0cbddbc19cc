"""The dtype policy of a layer that is float32 but for its products.

A product of 16 bits loses nothing that its operands had; what is added to it,
carried from step to step, or returned to a loss does. Keras sees a float32
layer. What a kept layer does with it is in `kept_layers`.
"""

from typing import Any

import keras

from tfamp.files.saved_models import registered


@registered
class Float32AroundProducts(keras.dtype_policies.DTypePolicy):
    """float32, with operands of products in another dtype.

    Args:
        former: the name of the policy that the layer had before, whose compute
            dtype its products take.
    """

    def __init__(self, former: str):
        super().__init__("float32")
        self.former = keras.dtype_policies.get(former)

    def get_config(self) -> dict[str, Any]:
        return {"former": self.former.name}

    def __eq__(self, other) -> bool:
        return type(other) is type(self) and other.former == self.former

    def __repr__(self) -> str:
        return f'<Float32AroundProducts "{self.former.name}">'


def policy_of(
    layer: keras.layers.Layer,
) -> keras.dtype_policies.DTypePolicy:
    """A layer's own policy, also out of a map of policies."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        # A model of a graph has no path.
        return policy[layer.path] if layer.path else policy.default_policy
    return policy


def former_policy(layer: keras.layers.Layer) -> str | None:
    """The name of the policy that a layer had before; None for others."""
    policy = policy_of(layer)
    if isinstance(policy, Float32AroundProducts):
        return policy.former.name
    return None


def product_dtype(layer: keras.layers.Layer) -> str | None:
    """What a float32 layer's products take; None where they take float32."""
    policy = policy_of(layer)
    if isinstance(policy, Float32AroundProducts):
        return policy.former.compute_dtype
    return None
