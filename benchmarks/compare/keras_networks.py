"""The networks as Keras models, for stock Keras and tfamp alike."""

import keras
import numpy as np
from keras import layers

from benchmarks.compare.cases import (
    SEED,
    AdamW,
    Case,
    Gpt,
    Mlp,
    Network,
    ResNet50,
    Sgd,
    UNet,
)
from recipes import language_model, segmentation, transformer


class KerasAttention(transformer.RotaryAttention):
    """The recipe's attention by Keras's operation in place of tfamp's."""

    attend = staticmethod(keras.ops.dot_product_attention)


def build(network: Network) -> keras.Model:
    """The model under the policy that is set, with float32 logits.

    Keras's guide to mixed precision has the output of every model in float32,
    and so have these: tfamp finds nothing to change that Keras's own user
    would not have done. Dropout is left out: no two frameworks draw alike.
    """
    keras.utils.set_random_seed(SEED)
    match network:
        case ResNet50(size, classes):
            body = keras.applications.ResNet50(
                weights=None,
                input_shape=(size, size, 3),
                classes=classes,
                classifier_activation=None,
            )
            _calm(body)
        case Gpt():
            config = language_model.Config(
                sequence_length=network.sequence_length,
                num_layers=network.num_layers,
                width=network.width,
                num_heads=network.num_heads,
                dropout=0.0,
            )
            return language_model.decoder(config, network.vocabulary_size)
        case UNet(size, widths, classes):
            inputs = keras.Input([size, size, 3])
            outputs = segmentation.unet(inputs, widths, classes)
            body = keras.Model(inputs, outputs)
        case Mlp((features, *hidden, classes)):
            inputs = keras.Input([features])
            x = inputs
            for width in hidden:
                x = layers.Dense(width, activation="relu")(x)
            body = keras.Model(inputs, layers.Dense(classes)(x))
    logits = layers.Activation("linear", dtype="float32", name="float32_logits")
    return keras.Model(body.input, logits(body.output))


def leave_to_keras(model: keras.Model) -> None:
    """Takes out of a new model what tfamp has made faster in its recipes.

    Then it is what a user of stock Keras writes.
    """
    for layer in model.layers:
        if isinstance(layer, transformer.RotaryAttention):
            # The layer has no weights, and its place in the graph stays.
            layer.__class__ = KerasAttention


def _calm(resnet: keras.Model) -> None:
    """Begins with residuals a tenth of what they are, as if well trained.

    With Keras's own beginning a step moves the loss by tens of percent, and
    float32 rounding by some: no two runs have comparable losses (Goyal et
    al., 2017, begin with 0).
    """
    for layer in resnet.layers:
        if layer.name.endswith("_3_bn"):
            layer.gamma.assign(0.1 * keras.ops.ones_like(layer.gamma))


def make_optimizer(case: Case) -> keras.optimizers.Optimizer:
    """The optimizer of the case."""
    match case.optimizer:
        case Sgd(rate, momentum):
            return keras.optimizers.SGD(rate, momentum=momentum)
        case AdamW(rate, decay, beta_1, beta_2, epsilon):
            return keras.optimizers.AdamW(
                rate,
                weight_decay=decay,
                beta_1=beta_1,
                beta_2=beta_2,
                epsilon=epsilon,
            )


def make_loss() -> keras.losses.Loss:
    """Cross-entropy of logits: the mean over examples, pixels or tokens."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def named_weights(model: keras.Model) -> dict[str, np.ndarray]:
    """The weights as "LAYER/WEIGHT", for another framework.

    LAYER is the class and which of its kind it is, in the model's order:
    "Conv2D3". Names that Keras makes up hang on what was built before.
    """
    numbers: dict[str, int] = {}
    found = {}
    for layer in model.layers:
        if not layer.weights:
            continue
        kind = type(layer).__name__
        number = numbers.get(kind, 0)
        numbers[kind] = number + 1
        for weight in layer.weights:
            found[f"{kind}{number}/{weight.name}"] = np.asarray(weight.numpy())
    return found
