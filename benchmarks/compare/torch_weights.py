"""Weights of a Keras model into a PyTorch module of the same layers."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

# By class of a layer: Keras's name of it, and of each weight PyTorch's name
# and the order of axes that turns the one into the other; None for the same.
_CONVOLUTION = {"kernel": ("weight", (3, 2, 0, 1)), "bias": ("bias", None)}
_LAYERS = {
    nn.Conv2d: ("Conv2D", _CONVOLUTION),
    # (H, W, out, in) there, (in, out, H, W) here: the same axes again.
    nn.ConvTranspose2d: ("Conv2DTranspose", _CONVOLUTION),
    nn.Linear: (
        "Dense",
        {"kernel": ("weight", (1, 0)), "bias": ("bias", None)},
    ),
    nn.Embedding: ("ReversibleEmbedding", {"embeddings": ("weight", None)}),
    nn.RMSNorm: ("RMSNormalization", {"scale": ("weight", None)}),
    nn.BatchNorm2d: (
        "BatchNormalization",
        {
            "gamma": ("weight", None),
            "beta": ("bias", None),
            "moving_mean": ("running_mean", None),
            "moving_variance": ("running_var", None),
        },
    ),
}


def load(module: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Gives the module the weights of the Keras model.

    Args:
        module: layers of each class in the order of the Keras model.
        weights: as `keras_networks.named_weights` names them.

    Raises:
        ValueError: a weight is left over on either side, or has another
            shape: the two are not the same model.
    """
    numbers: dict[str, int] = {}
    left = dict(weights)
    filled = set()
    for layer in module.modules():
        if type(layer) not in _LAYERS:
            continue
        kind, names = _LAYERS[type(layer)]
        number = numbers.get(kind, 0)
        numbers[kind] = number + 1
        for keras_name, (name, axes) in names.items():
            target = getattr(layer, name)
            if target is None:
                continue
            path = f"{kind}{number}/{keras_name}"
            if path not in left:
                raise ValueError(f"Keras's model has no {path}.")
            array = left.pop(path)
            if axes is not None:
                array = array.transpose(axes)
            value = torch.from_numpy(np.ascontiguousarray(array))
            if value.shape != target.shape:
                raise ValueError(
                    f"{path} is {tuple(value.shape)} in Keras's model and "
                    f"{tuple(target.shape)} in PyTorch's."
                )
            with torch.no_grad():
                target.copy_(value)
            filled.add(id(target))
    missing = [
        name for name, p in module.named_parameters() if id(p) not in filled
    ]
    if left or missing:
        raise ValueError(f"Only in Keras: {list(left)}; in PyTorch: {missing}.")
