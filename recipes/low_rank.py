"""Low-rank weights beside the frozen kernels of a model.

A kernel W stays as it is, and B A learns what to add to it (Hu et al., 2021,
"LoRA: Low-Rank Adaptation of Large Language Models"):

    y = W x + alpha / rank * B A x

A begins at random and B at zero, so that the model begins as its base does.
The branch is made of Keras layers, in a copy of the base. Keras's own
`Dense.enable_lora` adds B A to the kernel, in the compute dtype: what is less
than half the spacing of 16 bits there is lost, and a gradient as large as the
kernel is made on the way.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from recipes.int8_dense import Int8Dense
from tfamp.errors import InputError
from tfamp.precision.policy import precision_of

# The projections of `recipes.transformer`, by the ends of their names.
_TARGETS = {
    "attention": ("_query", "_key", "_value", "_attention_output"),
    "mlp": ("_mlp_gate", "_mlp_up", "_mlp_output"),
    "all": ("",),
}


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What is added to a base, and how that is stored.

    Attributes:
      rank: the rank of B A, at most; 0 for no branches, which leaves all
        weights of the base to be trained, in float32.
      alpha: over the rank, what B A is multiplied by.
      dropout: share of its features that A does not see in a step.
      targets: the kernels that get a branch: "attention", "mlp" or "all".
      base_dtype: what the base's kernels and embeddings are stored in:
        "compute", the dtype that they are computed in; "float32"; or "int8",
        the embeddings then being stored as for "compute".
    """

    rank: int
    alpha: float
    dropout: float
    targets: str
    base_dtype: str


def adapt(
    base: keras.Model, low_rank: LowRank, sequence_length: int
) -> keras.Model:
    """A frozen copy of a base, in the current precision, with branches.

    Args:
      base: a functional model of [B, T]; stays as it is.
      low_rank: what to add.
      sequence_length: the T of the copy.

    Returns:
      The model, not compiled. What trains is the weights of the branches, in
      float32, in which norms are stored too.

    Raises:
      InputError: the base has no such kernels, or they have fewer rows or
        columns than the rank, or it overflows the format it is stored in.
    """
    is_frozen = low_rank.rank > 0
    if not is_frozen and low_rank.base_dtype == "int8":
        raise InputError(
            "rank=0 trains the base, which base_dtype='int8' cannot be; use a "
            "rank of 1 or more, or another base_dtype."
        )
    targets = _targets(base, low_rank) if is_frozen else ()
    policy = keras.config.dtype_policy()
    stored = policy
    if is_frozen and low_rank.base_dtype != "float32":
        stored = keras.DTypePolicy(policy.compute_dtype)
    # A base in 16 bits says by float32 which layers are to stay so.
    is_16_bit = precision_of(base) != "float32"

    def copy(layer):
        if _is_product(layer):
            made = _product(layer, low_rank.base_dtype, policy, stored)
        else:
            config = layer.get_config()
            if not (is_16_bit and layer.compute_dtype == "float32"):
                is_table = isinstance(layer, layers.Embedding)
                config["dtype"] = stored if is_table else policy
            if config.get("reverse_dtype"):
                config["reverse_dtype"] = policy.compute_dtype
            made = type(layer).from_config(config)
        made.trainable = not is_frozen
        return made

    def call(layer, x, *args, **kwargs):
        y = layer(x, *args, **kwargs)
        name = layer.name
        if name in targets:
            y = layers.Add(name=f"{name}_lora_sum")(
                [y, _branch(x, y.shape[-1], name, low_rank)]
            )
        original = base.get_layer(name)
        if (
            _is_product(original)
            and original.activation is not keras.activations.linear
        ):
            y = layers.Activation(
                original.activation, name=f"{name}_activation"
            )(y)
        return y

    model = keras.models.clone_model(
        _uncompiled(base),
        input_tensors=keras.Input([sequence_length], dtype=base.input.dtype),
        clone_function=copy,
        call_function=call,
    )
    for layer in base.layers:
        if layer.weights:
            _store(layer, model.get_layer(layer.name))
    return model


def merge(model: keras.Model, base: keras.Model) -> keras.Model:
    """The base with the branches added to its kernels, in float32.

    Args:
      model: made from that base by `adapt`.
      base: for its layers; its weights are not looked at.

    Returns:
      A new model of the base's layers, not compiled. To rounding it computes
      what `model` does, whose kernels it takes as they are stored there.
    """
    merged = keras.models.clone_model(_uncompiled(base))
    updates = kernel_updates(model)
    for layer in merged.layers:
        if not layer.weights:
            continue
        trained = model.get_layer(layer.name)
        weights = [np.asarray(w, "float32") for w in trained.get_weights()]
        if _is_product(layer):
            kernel = np.asarray(trained.kernel, "float32")
            bias = weights[-1:] if layer.use_bias else []
            weights = [kernel + updates.get(layer.name, 0.0), *bias]
        layer.set_weights(weights)
    return merged


def branches(model: keras.Model) -> dict[str, dict[str, Any]]:
    """By the layer that it stands beside: the A, B and scale of each branch."""
    names = [
        layer.name.removesuffix("_lora_a")
        for layer in model.layers
        if layer.name.endswith("_lora_a")
    ]
    return {
        name: {
            "a": model.get_layer(f"{name}_lora_a").kernel,
            "b": model.get_layer(f"{name}_lora_b").kernel,
            "scale": model.get_layer(f"{name}_lora_scale").scale,
        }
        for name in names
    }


def kernel_updates(model: keras.Model) -> dict[str, np.ndarray]:
    """By layer, what its branch adds to its kernel: alpha / rank * B A."""
    return {
        name: each["scale"] * np.asarray(each["a"]) @ np.asarray(each["b"])
        for name, each in branches(model).items()
    }


def _targets(base: keras.Model, low_rank: LowRank) -> set[str]:
    products = {
        layer.name: layer for layer in base.layers if _is_product(layer)
    }
    targets = {
        name for name in products if name.endswith(_TARGETS[low_rank.targets])
    }
    if not targets:
        raise InputError(
            f"targets={low_rank.targets!r} finds none among the "
            f"{len(products)} Dense layers of the base"
            f"{': ' * bool(products)}{', '.join(sorted(products))}; expected "
            f"names that end in {' or '.join(_TARGETS[low_rank.targets])}."
        )
    for name in sorted(targets):
        shape = tuple(products[name].kernel.shape)
        if low_rank.rank > min(shape):
            raise InputError(
                f"rank={low_rank.rank} exceeds the kernel of {name}, which is "
                f"{shape[0]} by {shape[1]}; use {min(shape)} or less."
            )
    return targets


def _uncompiled(model: keras.Model) -> keras.Model:
    """The same layers; the clone of a compiled model has an optimizer too."""
    return keras.Model(model.input, model.output, name=model.name)


def _is_product(layer) -> bool:
    # A subclass may compute anything.
    return type(layer) is layers.Dense


def _product(layer, base_dtype, policy, stored):
    options = {"use_bias": layer.use_bias, "name": layer.name}
    if base_dtype == "int8":
        return Int8Dense(layer.units, dtype=policy, **options)
    return layers.Dense(layer.units, dtype=stored, **options)


def _branch(x, units: int, name: str, low_rank: LowRank):
    x = layers.Dropout(low_rank.dropout, name=f"{name}_lora_dropout")(x)
    x = layers.Dense(
        low_rank.rank,
        use_bias=False,
        # Uniform, of variance 1 / (3 inputs), as in the code of Hu et al.
        kernel_initializer=keras.initializers.VarianceScaling(
            1 / 3, "fan_in", "uniform"
        ),
        name=f"{name}_lora_a",
    )(x)
    x = layers.Dense(
        units,
        use_bias=False,
        kernel_initializer="zeros",
        name=f"{name}_lora_b",
    )(x)
    return layers.Rescaling(
        low_rank.alpha / low_rank.rank, name=f"{name}_lora_scale"
    )(x)


def _store(layer, copy) -> None:
    """Gives a copy the weights of a layer, in the dtypes that it has."""
    if _is_product(layer):
        # Whole, also where Keras's own low-rank weights are a part of it.
        weights = [layer.kernel] + [layer.bias] * layer.use_bias
    else:
        weights = layer.weights
    values = [np.asarray(weight, "float32") for weight in weights]
    variables = copy.weights
    if isinstance(copy, Int8Dense):
        copy.set_kernel(values.pop(0))
        variables = [copy.bias] * copy.use_bias
    for variable, value in zip(variables, values, strict=True):
        rounded = ops.cast(value, variable.dtype)
        if not np.all(ops.isfinite(rounded)):
            raise InputError(
                f"Weights of {layer.name} are not finite in {variable.dtype}, "
                f"up to {np.max(np.abs(value)):.3g} in the base; use a sound "
                "base, or base_dtype='float32'."
            )
        variable.assign(rounded)
