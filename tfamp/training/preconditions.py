"""What `fit` and `evaluate` ask of their arguments.

What is not met is an `InputError`, raised before anything is traced.
"""

import numbers
import os
from collections.abc import Collection, Mapping
from typing import Any

import keras
import tensorflow as tf
from absl import logging
from packaging.version import Version

from tfamp import keras_internals, tensorflow_internals
from tfamp.distribute.strategy import devices_of, static_rows
from tfamp.errors import InputError
from tfamp.hardware.devices import detect_hardware
from tfamp.precision.policy import precision_of

# oneDNN of TensorFlow 2.21 does not end making their kernels for a CPU with
# bfloat16 instructions, unless there are few outputs or many channels.
_DEPTHWISE = (
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
_ENDLESS_WIDTH = 15


def check_counts(counts: Mapping[str, Any], least: int = 1) -> None:
    for name, count in counts.items():
        if count is None:
            continue
        if not isinstance(count, numbers.Integral) or count < least:
            raise InputError(
                f"{name}={count!r} must be an integer of at least {least}."
            )


def check_runs_eagerly(name: str) -> None:
    if not tf.executing_eagerly():
        raise InputError(
            f"{name} was called while a tf.function is traced; it makes the "
            "graph of its steps itself, so call it from plain Python."
        )


def check_compiled(model: keras.Model) -> None:
    if not model.compiled:
        raise InputError(
            f"Model {model.name!r} is not compiled; call model.compile(...)."
        )


def check_optimizer(model: keras.Model) -> None:
    """Where Keras's own code fails on TensorFlow, that is said at once."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    is_muon = optimizer is not None and any(
        isinstance(each, keras.optimizers.Muon)
        for each in keras_internals.single_optimizers(optimizer)
    )
    if is_muon and Version(keras.__version__) < Version("3.13"):
        raise InputError(
            f"Muon of Keras {keras.__version__} fails on TensorFlow, in "
            "Model.fit too; pip install 'keras>=3.13', or use AdamW."
        )


def check_dataset(dataset: Any) -> None:
    """For doors that take nothing but a dataset."""
    if not isinstance(dataset, tf.data.Dataset):
        raise InputError(
            f"Expected a tf.data.Dataset of batches, got "
            f"{type(dataset).__name__}; for arrays: tf.data.Dataset."
            "from_tensor_slices((x, y)).batch(32)."
        )


def check_batches(
    dataset: tf.data.Dataset,
    strategy: tf.distribute.Strategy,
    microbatches: int,
) -> None:
    batch_size = static_rows(dataset.element_spec)
    pieces = strategy.num_replicas_in_sync * microbatches
    if microbatches > 1 and batch_size is not None and batch_size % pieces:
        raise InputError(
            f"The batch size {batch_size} is not divisible by "
            f"{strategy.num_replicas_in_sync} replicas times {microbatches} "
            f"microbatches; use {max(batch_size // pieces, 1) * pieces}."
        )


def check_ends(dataset: tf.data.Dataset) -> None:
    if is_endless(dataset):
        raise InputError(
            "The dataset repeats without end; pass steps_per_epoch."
        )


def is_endless(dataset: tf.data.Dataset) -> bool:
    return int(dataset.cardinality().numpy()) == tf.data.INFINITE_CARDINALITY


def warn_of_eager_sums(model: keras.Model) -> None:
    """Says what only a traced step can be spared."""
    if model.run_eagerly and precision_of(model) != "float32":
        logging.warning(
            "run_eagerly=True leaves TensorFlow's kernels as they are, of "
            "which some add in 16 bits: sums over many rows, gradients of "
            "biases among them, may be far off. Without it they are made in "
            "float32."
        )


def warn_of_endless_kernels(
    model: keras.Model, strategy: tf.distribute.Strategy
) -> None:
    """Says why nothing may come, before the call that does not end."""
    wide = [
        layer.path
        for layer in keras_internals.all_layers(model)
        if isinstance(layer, _DEPTHWISE)
        and layer.compute_dtype == "bfloat16"
        and layer.kernel_size[-1] >= _ENDLESS_WIDTH
    ]
    on_cpus = all("CPU" in device for device in devices_of(strategy))
    if not wide or not on_cpus or "ONEDNN_MAX_CPU_ISA" in os.environ:
        return
    if "avx512_bf16" in (detect_hardware().cpu_bf16 or ()):
        logging.warning(
            "Layer %s: on this CPU TensorFlow can hang in a depthwise "
            "convolution in bfloat16 that is %d or more wide. Set "
            "ONEDNN_MAX_CPU_ISA=AVX512_CORE in the environment, or pass "
            'dtype="float32" to the layer.',
            wide[0],
            _ENDLESS_WIDTH,
        )


def check_own_step(model: keras.Model, microbatches: int) -> None:
    if (
        microbatches > 1
        and type(model).train_step is not keras.Model.train_step
    ):
        raise InputError(
            f"microbatches={microbatches} needs Keras's own train_step, which "
            f"{type(model).__name__} overrides; accumulate gradients there."
        )


def check_can_accumulate(model: keras.Model) -> None:
    for layer in keras_internals.all_layers(model):
        if _synchronizes(layer, model.distribute_strategy):
            raise InputError(
                f"Layer {layer.path} synchronizes replicas, which no "
                "microbatch can; use microbatches=1 or synchronized=False."
            )


def resolve_jit(
    jit: bool | str,
    model: keras.Model,
    strategy: tf.distribute.Strategy,
    is_custom: bool,
) -> bool:
    """Whether XLA compiles the passes, from `jit` and what `compile` was told.

    Raises:
        InputError: for an unknown `jit`, one that cannot be, or one that
            contradicts `compile(jit_compile=...)`.
    """
    if jit not in (True, False, "auto"):
        raise InputError(f"jit={jit!r}; expected True, False or 'auto'.")
    compiled = keras_internals.asked_to_jit(model)
    if compiled is not None and jit == (not compiled):
        raise InputError(
            f"jit={jit} contradicts compile(jit_compile={compiled}); leave "
            "one of the two out."
        )
    obstacle = None
    if is_custom:
        obstacle = f"{type(model).__name__} overrides train_step"
    elif model.run_eagerly:
        obstacle = "the model was compiled with run_eagerly=True"
    else:
        for layer in keras_internals.all_layers(model):
            if not layer.supports_jit:
                obstacle = f"layer {layer.path} does not support XLA"
            elif _synchronizes(layer, strategy):
                obstacle = f"layer {layer.path} synchronizes replicas"
    if jit is True and obstacle:
        raise InputError(f"jit=True, but {obstacle}; pass jit=False.")
    if jit == "auto" and compiled is not None:
        if compiled and obstacle:
            logging.warning(
                "compile(jit_compile=True), but %s: trains without XLA.",
                obstacle,
            )
        return compiled and not obstacle
    if jit == "auto":
        has_accelerator = any(
            "GPU" in device or "TPU" in device
            for device in devices_of(strategy)
        )
        # XLA refuses operations on GPUs that it cannot repeat bit by bit.
        return (
            has_accelerator
            and not obstacle
            and not tensorflow_internals.is_op_determinism_enabled()
        )
    return bool(jit)


def resolve_steps_per_loop(
    steps_per_loop: int | str, model: keras.Model
) -> int | str:
    """fit's own, or what `compile(steps_per_execution=...)` said."""
    compiled = model.steps_per_execution
    if compiled == 1 or steps_per_loop == compiled:
        return steps_per_loop
    if steps_per_loop != "auto":
        raise InputError(
            f"steps_per_loop={steps_per_loop!r}, but the model was compiled "
            f"with steps_per_execution={compiled}; leave one of them out."
        )
    return compiled


def check_validation_freq(frequency: int | Collection[int]) -> None:
    is_count = isinstance(frequency, int) and frequency > 0
    if not is_count and not isinstance(frequency, (list, tuple, set)):
        raise InputError(
            f"validation_freq={frequency!r}; expected an integer of at least "
            "1, or a list, tuple or set of epochs."
        )


def check_takes(name: str, model: keras.Model, x: Any, y: Any) -> None:
    """`(x, y)` in a tuple is two inputs to Keras, where one is wanted."""
    inputs = getattr(model, "inputs", None) or ()
    if y is None and isinstance(x, tuple) and len(inputs) == 1 < len(x):
        raise InputError(
            f"x is a tuple of {len(x)}, but the model has one input; pass "
            f"targets by themselves: {name}(model, x, y)."
        )


def _synchronizes(
    layer: keras.layers.Layer, strategy: tf.distribute.Strategy
) -> bool:
    """Whether a pass reduces over replicas, as no inner graph may."""
    return strategy.num_replicas_in_sync > 1 and getattr(
        layer, "synchronized", False
    )
