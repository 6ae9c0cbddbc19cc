"""Measures points of one series; a process of `benchmarks.scaling`.

    python -m benchmarks.scaling.points --series=batch --values=1,2
        --precision=float32 --steps=10 --threads=4 --result=PATH

PATH gets JSON with `points`: `value`, `variant`, `parameters` and
`step_milliseconds`, the median over epochs. Started by `tfamp.launch`, the
worker that is chief writes it.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import tfamp
from benchmarks.scaling.series import SERIES
from tfamp.recipe import quiet_tensorflow
from tfamp.recipe.flags import flag, parse_flags

_WARM_UP_EPOCHS = 2
_TIMED_EPOCHS = 3

_SEQUENCE_LENGTH, _VOCABULARY, _WIDTH, _HEADS = 128, 1024, 256, 4
_LAYERS, _BATCH, _SHARED_BATCH = 2, 8, 16
_NUMBERS_IN_A_VARIABLE = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """What one process measures."""

    series: str = flag("", "its name")
    values: tuple[int, ...] = flag((), "which of its values")
    precision: str = flag("float32", "of the model")
    steps: int = flag(1, "of an epoch", minimum=1)
    threads: int = flag(1, "of an operation", minimum=1)
    strategy: str = flag("one_device", "of tfamp; replicas set it themselves")
    result: str = flag("", "the file to write")


def main(argv: list[str]) -> None:
    """Measures, and writes the result."""
    quiet_tensorflow()
    _, options = parse_flags(Options, argv)
    (series,) = [each for each in SERIES if each.name == options.series]
    import tensorflow as tf

    from tfamp.distribute.consensus import is_chief
    from tfamp.files.output import write_atomically

    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: options.threads])
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    if series.name == "replicas":
        (replicas,) = options.values
        strategy = tfamp.get_strategy("mirrored", num_devices=replicas)
    else:
        strategy = tfamp.get_strategy(options.strategy)
    tfamp.set_precision(options.precision)
    points = []
    for value in options.values:
        for variant in series.variants:
            print(f"{series.name} {value} {variant}", flush=True)
            with strategy.scope():
                found = measure(series.name, value, variant, options.steps)
            points.append({"value": value, "variant": variant, **found})
    if is_chief(strategy):
        text = json.dumps({"points": points}) + "\n"
        write_atomically(pathlib.Path(options.result), text)


def measure(series: str, value: int, variant: str, steps: int) -> dict:
    """Trains some epochs, in the scope of a strategy.

    Args:
        series: what is varied.
        value: of it.
        variant: who trains.
        steps: of an epoch.

    Returns:
        `parameters` and `step_milliseconds`.
    """
    import keras

    keras.utils.set_random_seed(0)
    model, batch = _model_and_batch(series, value)
    microbatches = value if series == "microbatches" else 1
    seconds = _TRAINERS[variant](model, batch, steps, microbatches)
    return {
        "parameters": model.count_params(),
        "step_milliseconds": 1000 * statistics.median(seconds) / steps,
    }


def _model_and_batch(series: str, value: int) -> tuple[Any, tuple[Any, Any]]:
    """A compiled model, but for `compile`'s options of the loop."""
    import keras
    import numpy as np

    random = np.random.default_rng(0)
    if series == "variables":
        x = random.normal(size=(8, _NUMBERS_IN_A_VARIABLE)).astype("float32")
        inputs = keras.Input(x.shape[1:])
        return keras.Model(inputs, _many_variables(value)(inputs)), (x, x)
    if series == "loop":
        x = random.normal(size=(1, 1)).astype("float32")
        inputs = keras.Input([1])
        return keras.Model(inputs, keras.layers.Dense(1)(inputs)), (x, x)
    from benchmarks.compare import keras_networks
    from benchmarks.compare.cases import Gpt

    layers = value if series == "layers" else _LAYERS
    rows = {"layers": _BATCH, "batch": value}.get(series, _SHARED_BATCH)
    model = keras_networks.build(
        Gpt(layers, _WIDTH, _HEADS, _SEQUENCE_LENGTH, _VOCABULARY)
    )
    text = random.integers(_VOCABULARY, size=(rows, _SEQUENCE_LENGTH + 1))
    text = text.astype("int32")
    return model, (text[:, :-1], text[:, 1:])


def _many_variables(number: int):
    """A layer that has so many small variables and does little with them."""
    import keras

    class ManyVariables(keras.layers.Layer):
        def build(self, input_shape):
            self.parts = [
                self.add_weight(shape=[input_shape[-1]], name=f"part{i}")
                for i in range(number)
            ]

        def call(self, x):
            parts = keras.ops.stack([part.value for part in self.parts])
            return x * keras.ops.mean(parts, axis=0)

    return ManyVariables()


def _compile(model, wrap: Callable[[Any], Any], steps_in_call: int = 1) -> None:
    import keras

    is_text = model.output.shape[-1] == _VOCABULARY
    model.compile(
        optimizer=wrap(keras.optimizers.AdamW(1e-4)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if is_text
        else "mse",
        auto_scale_loss=False,
        jit_compile=False,
        steps_per_execution=steps_in_call,
    )


def _batches(batch):
    import tensorflow as tf

    from tfamp.analysis.bench.feed import in_memory

    return in_memory([tuple(map(tf.constant, batch))])


def _fit_arguments(batch, steps) -> tuple[list[float], dict[str, Any]]:
    """Seconds of epochs to come, and what both kinds of `fit` are given."""
    import keras

    seconds: list[float] = []
    begins = []

    def end(epoch, logs):
        # Makes the device's work a part of the time.
        float(logs["loss"])
        if epoch >= _WARM_UP_EPOCHS:
            seconds.append(time.perf_counter() - begins[-1])

    epochs = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: begins.append(time.perf_counter()),
        on_epoch_end=end,
    )
    return seconds, {
        "epochs": _WARM_UP_EPOCHS + _TIMED_EPOCHS,
        "steps_per_epoch": steps,
        "callbacks": [epochs],
        "verbose": 0,
    }


def _tfamp(model, batch, steps, microbatches, steps_per_loop="auto"):
    _compile(model, tfamp.wrap_optimizer)
    seconds, arguments = _fit_arguments(batch, steps)
    tfamp.fit(
        model,
        _batches(batch),
        microbatches=microbatches,
        steps_per_loop=steps_per_loop,
        jit=False,
        **arguments,
    )
    return seconds


def _tfamp_single(model, batch, steps, microbatches):
    return _tfamp(model, batch, steps, microbatches, steps_per_loop=1)


def _keras(model, batch, steps, microbatches, steps_in_call=1):
    del microbatches
    _compile(model, lambda optimizer: optimizer, steps_in_call)
    seconds, arguments = _fit_arguments(batch, steps)
    model.fit(_batches(batch), shuffle=False, **arguments)
    return seconds


def _keras_loop(model, batch, steps, microbatches):
    return _keras(model, batch, steps, microbatches, steps_in_call=steps)


def _function(model, batch, steps, microbatches):
    del microbatches
    step = _bare_step(model, batch)

    def epoch():
        for _ in range(steps):
            loss = step()
        return loss

    return _time_epochs(epoch)


def _graph(model, batch, steps, microbatches):
    import tensorflow as tf

    del microbatches
    step = _bare_step(model, batch)

    @tf.function(autograph=False)
    def epoch():
        return tf.while_loop(
            lambda i, loss: i < steps,
            lambda i, loss: (i + 1, step()),
            (0, 0.0),
            parallel_iterations=1,
        )[1]

    return _time_epochs(epoch)


_TRAINERS = {
    "tfamp": _tfamp,
    "tfamp_single": _tfamp_single,
    "keras": _keras,
    "keras_loop": _keras_loop,
    "function": _function,
    "graph": _graph,
}


def _bare_step(model, batch):
    """Keras's model and optimizer, and nothing else: the least there is."""
    import tensorflow as tf

    _compile(model, lambda optimizer: optimizer)
    model.optimizer.build(model.trainable_variables)
    iterator = iter(_batches(batch))

    @tf.function(autograph=False)
    def step():
        x, y = next(iterator)
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        variables = [v.value for v in model.trainable_variables]
        model.optimizer.apply(tape.gradient(loss, variables))
        return tf.cast(loss, tf.float32)

    return step


def _time_epochs(epoch) -> list[float]:
    seconds = []
    for number in range(_WARM_UP_EPOCHS + _TIMED_EPOCHS):
        begin = time.perf_counter()
        float(epoch())
        if number >= _WARM_UP_EPOCHS:
            seconds.append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    main(sys.argv[1:])
