"""The measurements of `benchmarks.gpu`, in a process that has the GPU.

    python -m benchmarks.gpu_measurements RESULTS MEASUREMENT ...

Each MEASUREMENT is a JSON object, as `benchmarks.gpu.plan` makes them. For
each a line is added to the file RESULTS: what was asked, and what was found or
why there is nothing. What a measurement can find:

*   `step_milliseconds` (median, with `lowest` and `highest`),
    `peak_memory_bytes`, `start_seconds` (tracing, compiling and the first
    epochs), `loss` (mean of the last epoch);
*   `metric` and `skipped_steps`, of a whole training;
*   `gigabytes_per_second`, of an all-reduce: bytes of one replica a second.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import tfamp
from benchmarks.compare.cases import AdamW, Case, Gpt, Mlp, ResNet50, Sgd
from benchmarks.compare.contestants import Contestant
from benchmarks.compare.memory import ResidentMemory, TensorFlowGpuMemory
from benchmarks.compare.turns import Gauge, Schedule, Turns
from tfamp.errors import InputError
from tfamp.recipe import describe_exit, quiet_tensorflow

# At the sizes that papers and users train.
REAL = {
    "resnet50": Case(
        "resnet50", ResNet50(224, 1000), 128, Sgd(1e-3, 0.9), steps=10
    ),
    "gpt": Case(
        "gpt", Gpt(12, 768, 12, 1024, 32768), 8, AdamW(1e-4, 0.01), steps=10
    ),
}
# What takes longest on a CPU is to trace: another network stands for the
# first, and trains the same way.
TINY = {
    "resnet50": Case(
        "resnet50", Mlp((4, 8, 3)), 2, Sgd(1e-3, 0.9), steps=1, num_batches=1
    ),
    "gpt": Case(
        "gpt", Gpt(1, 16, 2, 8, 32), 2, AdamW(1e-4, 0.01), 1, num_batches=1
    ),
}
CONTESTANTS = {
    each.name: each
    for each in (
        Contestant("tfamp", "tfamp", "tfamp.fit, no XLA", plain=True),
        Contestant("tfamp_xla", "tfamp", "tfamp.fit, XLA", compiled=True),
        Contestant("keras", "keras", "Model.fit", whole_epochs=True),
        Contestant(
            "keras_xla",
            "keras",
            "Model.fit, XLA",
            compiled=True,
            whole_epochs=True,
        ),
        Contestant("torch", "torch", "PyTorch, eager"),
        Contestant(
            "torch_compile", "torch", "PyTorch, compiled", compiled=True
        ),
    )
}

_REDUCED_BYTES = 2**28


class NotHere(Exception):
    """The measurement needs what this host has not; the message says what."""


def train(device: str, tiny: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """Step time and memory of a case, trained by a contestant."""
    contestant = CONTESTANTS[asked["contestant"]]
    case = (TINY if tiny else REAL)[asked["case"]]
    is_torch = contestant.framework == "torch"
    if is_torch:
        training = _torch(device)
        gauge = training.prepare(device, threads=os.cpu_count() or 1)
    else:
        from benchmarks.compare import keras_training as training

        gauge = _prepared(device)
    found: list[dict[str, Any]] = []
    schedule = Schedule(rounds=1 if tiny else 3, timed_epochs=1 if tiny else 2)
    turns = Turns(schedule, gauge, wait=lambda: None, report=found.append)
    arguments = (contestant, case, asked["precision"], schedule.epochs, turns)
    with _tf32(asked["tf32"], is_torch):
        if is_torch:
            with tempfile.TemporaryDirectory() as folder:
                weights = _first_weights(case, pathlib.Path(folder))
                training.train(*arguments, device=device, weights=weights)
        else:
            training.train(*arguments)
    start, *timed = found
    times = [
        1000 * seconds / case.steps
        for turn in timed
        for seconds in turn["epoch_seconds"]
    ]
    return {
        "title": case.title,
        **_spread(times),
        "peak_memory_bytes": max(t["peak_memory_bytes"] or 0 for t in timed),
        "start_seconds": sum(start["start_seconds"]),
        "loss": timed[-1]["losses"][-1],
    }


def recipe(device: str, tiny: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """Step time and memory of a recipe, as `tfamp bench` measures them."""
    from tfamp.analysis.bench.run import measure, run_config
    from tfamp.training import fit, preconditions

    _prepared(device)
    module = importlib.import_module(f"recipes.{asked['recipe']}")
    settings = _settings(module.Config, tiny, asked["recipe"])
    config = run_config(module.Config, settings, asked["precision"])
    arguments = argparse.Namespace(
        precision=asked["precision"],
        tf32=None,
        steps=3 if tiny else 30,
        count_flops=False,
    )
    # A recipe leaves it to fit; what cannot be compiled stays as it is.
    resolve = preconditions.resolve_jit
    chosen = "auto" if asked["xla"] and device == "gpu" else False
    with (
        mock.patch.object(
            fit.preconditions,
            "resolve_jit",
            lambda jit, *others: resolve(chosen, *others),
        ),
        _tf32(asked["tf32"], is_torch=False),
    ):
        result = measure(module, config, arguments)
    names = (
        *("step_milliseconds", "in_memory_step_milliseconds", "batch_size"),
        *("peak_memory_bytes", "compile_seconds", "skipped_steps"),
    )
    return {name: result[name] for name in names}


def parity(device: str, tiny: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """The image recipe, trained to its end."""
    from recipes import image_classification

    _prepared(device)
    settings = {"epochs": 1, "batch_size": 1024} if tiny else {}
    config = image_classification.Config(
        precision=asked["precision"], seed=asked["seed"], **settings
    )
    with _tf32(True, is_torch=False):
        metrics = image_classification.train(config)
    return {"metric": float(metrics["accuracy"])}


def scaling(device: str, tiny: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """Step time of one batch a GPU, on so many of them."""
    from benchmarks.compare import keras_training

    gauge = _prepared(device)
    strategy = _replicas(device, asked["replicas"])
    case = (TINY if tiny else REAL)["resnet50"]
    case = dataclasses.replace(
        case, batch_size=case.batch_size * strategy.num_replicas_in_sync
    )
    found: list[dict[str, Any]] = []
    schedule = Schedule(rounds=1, timed_epochs=1 if tiny else 4)
    turns = Turns(schedule, gauge, wait=lambda: None, report=found.append)
    with strategy.scope():
        keras_training.train(
            CONTESTANTS["tfamp"],
            case,
            asked["precision"],
            schedule.epochs,
            turns,
        )
    times = [1000 * each / case.steps for each in found[-1]["epoch_seconds"]]
    return {
        "title": case.title,
        "replicas": strategy.num_replicas_in_sync,
        **_spread(times),
        "peak_memory_bytes": found[-1]["peak_memory_bytes"],
    }


def reduce(device: str, tiny: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """How fast gradients cross between the GPUs, in a dtype."""
    import tensorflow as tf

    from tfamp.distribute import reduction

    strategy = _replicas(device, asked["replicas"])
    dtype = tf.as_dtype(asked["dtype"])
    size = (2**10 if tiny else _REDUCED_BYTES) // dtype.size

    @tf.function(autograph=False)
    def everywhere():
        def on_replica():
            ones = tf.ones([size], dtype)
            return reduction.sum_over_replicas([ones], dtype.name)[0][0]

        return strategy.run(on_replica)

    def seconds() -> float:
        begin = time.perf_counter()
        (first, *_) = strategy.experimental_local_results(everywhere())
        total = float(first)
        if total != strategy.num_replicas_in_sync:
            raise ValueError(f"the sum over replicas is {total}")
        return time.perf_counter() - begin

    seconds()
    times = [seconds() for _ in range(1 if tiny else 10)]
    return {
        "replicas": strategy.num_replicas_in_sync,
        "gigabytes_per_second": size
        * dtype.size
        / statistics.median(times)
        / 1e9,
    }


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (train, recipe, parity, scaling, reduce)
}


def _torch(device: str):
    if importlib.util.find_spec("torch") is None:
        raise NotHere("PyTorch is not installed")
    import torch

    if device == "gpu" and not torch.cuda.is_available():
        raise NotHere("PyTorch sees no GPU here")
    from benchmarks.compare import torch_training

    return torch_training


def _first_weights(case: Case, folder: pathlib.Path) -> pathlib.Path:
    """Those of Keras's model, made on the host."""
    import numpy as np
    import tensorflow as tf

    from benchmarks.compare import keras_networks

    # TensorFlow would take the GPU's memory, which PyTorch needs.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    tfamp.set_precision("float32")
    model = keras_networks.build(case.network)
    path = folder / "weights.npz"
    np.savez(path, **keras_networks.named_weights(model))
    return path


@contextlib.contextmanager
def _tf32(is_on: bool, is_torch: bool) -> Iterator[None]:
    """Whether products of float32 may round to TF32, while it lasts."""
    if is_torch:
        import torch

        torch.set_float32_matmul_precision("high" if is_on else "highest")
        torch.backends.cudnn.allow_tf32 = is_on
        yield
        return
    import tensorflow as tf

    config = tf.config.experimental
    before = config.tensor_float_32_execution_enabled()
    config.enable_tensor_float_32_execution(is_on)
    try:
        yield
    finally:
        config.enable_tensor_float_32_execution(before)


def _replicas(device: str, wanted: int):
    """A strategy over so many devices; 0 for all GPUs there are."""
    import tensorflow as tf

    count = len(tf.config.list_physical_devices("GPU"))
    if device == "gpu" and count < 2:
        raise NotHere(f"it takes several GPUs, and there is {count}")
    _prepared(device)
    return tfamp.get_strategy(
        "mirrored", num_devices=wanted or (count if device == "gpu" else 2)
    )


def _prepared(device: str) -> Gauge:
    """What tells memory; TensorFlow takes of the GPU's what it needs."""
    import tensorflow as tf

    if device == "cpu":
        return ResidentMemory()
    # Not once the GPU is in use; then it is set already.
    with contextlib.suppress(RuntimeError):
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
    return TensorFlowGpuMemory()


def _settings(config_class: type, tiny: bool, name: str) -> dict[str, str]:
    # A base of its own would have to be trained first; its time does not
    # count, but takes all there is.
    small = {"sample_length": "0", "base_epochs": "1"}
    if tiny:
        small |= {"batch_size": "8", "base_steps_per_epoch": "1"}
        small |= {"num_layers": "1", "width": "16", "num_heads": "2"}
    fields = {field.name for field in dataclasses.fields(config_class)}
    return {key: value for key, value in small.items() if key in fields}


def _spread(times: list[float]) -> dict[str, float]:
    return {
        "step_milliseconds": statistics.median(times),
        "lowest": min(times),
        "highest": max(times),
    }


def _found(device: str, tiny: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """A result, or a line on why there is none."""
    try:
        found = KINDS[asked["kind"]](device, tiny, asked)
    except NotHere as error:
        return {"status": "not here", "line": str(error)}
    except Exception as error:
        described = describe_exit(error)
        lines = str(error).strip().splitlines() or [""]
        line = described[0] if described else lines[0]
        return {"status": "failed", "line": f"{type(error).__name__}: {line}"}
    return {"status": "done", **found}


def main(argv: list[str]) -> int:
    """Measures what the arguments say, and adds a line for each."""
    quiet_tensorflow()
    results, device, tiny, *measurements = argv
    if device not in ("gpu", "cpu"):
        raise InputError(f"device={device!r}; expected 'gpu' or 'cpu'.")
    if device == "cpu":
        _two_devices()
    for text in measurements:
        asked = json.loads(text)
        begin = time.monotonic()
        found = _found(device, tiny == "tiny", asked)
        line = {**asked, **found, "seconds": time.monotonic() - begin}
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return 0


def _two_devices() -> None:
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * 2,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
