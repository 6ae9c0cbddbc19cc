"""What a device holds in a training, by what it is for.

The weights, masters, moments and gradients follow from the shapes of the
optimizer's variables; what is kept for the backward pass is counted in the
graph. What a kernel works in, and what the allocator rounds, is not in it.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras

from tfamp import keras_internals
from tfamp.analysis.memory.kept import kept_bytes
from tfamp.errors import InputError
from tfamp.recipe.subject import Subject
from tfamp.scaling.optimizer import LossScaleOptimizer
from tfamp.training import safe
from tfamp.training.narrow_weights import in_16_bits

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a model and its optimizer are made of, as one replica alone has it.

    Attributes:
        precision: of the model.
        shard: whether the optimizer is in shards.
        weight_bytes: by trainable weight: of an element, as it is kept.
        weight_sizes: by trainable weight: its elements.
        moments: how many moments the optimizer has for each element.
        other_bytes: of weights that do not train, at any number of replicas.
        kept: bytes that wait for the backward pass, at the recipe's batch.
    """

    precision: str
    shard: bool
    weight_bytes: Sequence[int]
    weight_sizes: Sequence[int]
    moments: float
    other_bytes: int
    kept: int


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """What one of several devices holds; all in bytes.

    Attributes:
        weights: as the model reads them, and those that do not train.
        masters: float32 weights beside those; 0 where those are float32.
        moments: of the optimizer.
        gradients: in float32, whole, as they are summed over replicas.
        kept: from the forward to the backward pass.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    kept: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def count(subject: Subject, precision: str) -> Counted:
    """Counts what a recipe's model needs, as it is built here.

    Args:
        subject: the model and its data; of one replica.
        precision: what the model was built in.

    Raises:
        InputError: for a model with a `train_step` of its own, or data of
            unknown shape.
    """
    model = subject.model
    if type(model).train_step is not keras.Model.train_step:
        raise InputError(
            f"{type(model).__name__} has its own train_step, whose graph "
            "cannot be counted; use a recipe with Keras's."
        )
    spec = subject.train_batches.element_spec
    safe.build_layers(model, spec, False)
    safe.make_safe(model, "auto", 0)
    safe.build_rest(model, spec, False)
    optimizer = model.optimizer
    is_sharded = isinstance(optimizer, LossScaleOptimizer) and optimizer.shard
    x, y, _ = keras.utils.unpack_x_y_sample_weight(
        next(iter(subject.train_batches))
    )
    weights = model.trainable_variables
    sizes = [math.prod(weight.shape) for weight in weights]
    with in_16_bits(model, spec) if is_sharded else contextlib.nullcontext():
        kept = kept_bytes(model, x, y)
        widths = [keras_internals.stored(w).dtype.size for w in weights]
    moments = sum(
        math.prod(variable.shape)
        for variable in optimizer.inner_optimizer.variables
        if variable.shape.rank
    )
    trainable = {id(weight) for weight in weights}
    return Counted(
        precision=precision,
        shard=is_sharded,
        weight_bytes=widths,
        weight_sizes=sizes,
        moments=moments / max(sum(sizes), 1),
        other_bytes=sum(
            math.prod(each.shape) * keras_internals.stored(each).dtype.size
            for each in model.variables
            if id(each) not in trainable
            and keras.backend.is_float_dtype(each.dtype)
        ),
        kept=kept.total,
    )


def on_device(counted: Counted, replicas: int) -> DeviceBytes:
    """What each of so many devices holds, the recipe's batch on each."""
    parts = replicas if counted.shard else 1
    # A stretch is filled up to the same length on all replicas.
    stretches = sum(-(-size // parts) for size in counted.weight_sizes)
    return DeviceBytes(
        weights=counted.other_bytes
        + sum(
            size * width
            for size, width in zip(
                counted.weight_sizes, counted.weight_bytes, strict=True
            )
        ),
        masters=stretches * _FLOAT32 if counted.shard else 0,
        moments=round(counted.moments * stretches * _FLOAT32),
        gradients=sum(counted.weight_sizes) * _FLOAT32,
        kept=counted.kept,
    )


def of_size(
    precision: str, shard: bool, weights: float, moments: float
) -> Counted:
    """A model of so many weights, all of which are products' in 16 bits.

    Nothing is known of what it keeps for its backward pass, but for the 16-bit
    copies of the weights.
    """
    size = round(weights)
    is_float32 = precision == "float32"
    return Counted(
        precision=precision,
        shard=shard,
        weight_bytes=[2 if shard and not is_float32 else 4],
        weight_sizes=[size],
        moments=moments,
        other_bytes=0,
        kept=0 if shard or is_float32 else 2 * size,
    )


def row(counted: Counted, replicas: int) -> dict[str, Any]:
    """A row of the table, for people and for programs."""
    found = on_device(counted, replicas)
    return {
        "precision": counted.precision,
        "shard": counted.shard,
        "replicas": replicas,
        **{
            f"{field.name}_bytes": getattr(found, field.name)
            for field in dataclasses.fields(found)
        },
        "total_bytes": found.total,
    }
