"""The weights that never train: which they are, and what is in them."""

import hashlib

import keras
import numpy as np

from tfamp import keras_internals


def frozen_weights(model: keras.Model) -> list[keras.Variable]:
    """The weights of layers whose `trainable` is False, in the model's order.

    Training leaves them as they are: batch normalization, frozen, does not
    move its statistics either. What a layer that does train keeps beside its
    weights is not frozen (moving statistics), and neither are the seeds of
    dropout, in any layer.

    Args:
        model: built.
    """
    frozen = set()
    for layer in keras_internals.all_layers(model):
        # A layer that trains may be inside one that does not.
        inner = {
            id(weight)
            for each in keras_internals.sublayers(layer)
            for weight in each.weights
        }
        if not layer.trainable:
            frozen |= {id(weight) for weight in layer.weights} - inner
    frozen -= {id(variable) for variable in model.trainable_variables}
    return [weight for weight in model.weights if id(weight) in frozen]


def fingerprint(variable: keras.Variable) -> str:
    """A hash of a variable's bits, in hexadecimal digits."""
    value = np.ascontiguousarray(variable.numpy())
    return hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
