"""One run of `tfamp bench`: a recipe in one precision, measured or tried.

    python -m tfamp.analysis.bench.run RECIPE --precision=mixed_bfloat16
        --steps=20 [--tf32=off] [--count_flops] [--config.FIELD=VALUE ...]
        --result=PATH

PATH gets JSON: `precision`, `trained_precision` (what the model's layers
compute in), `tf32`, `replicas`, `batch_size`, the figures of
`bench_clock.StepTimer`, `peak_memory_bytes` and `resident_bytes_before` (of
the process before it trained; null but on a CPU of Linux),
`product_rate` (operations a second in large matrix products on one device),
and with `--count_flops` `flops_per_step` and `off_multiple` (share of them in
products with a width that is no multiple of `dimension_multiple`), or in their
place `flops_reason`.

With `--trace=FOLDER` it leaves a trace for TensorBoard, with `--rows=N` it
only tries whether a batch of N rows fits: status 71 says that it does not.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tfamp.errors import InputError
from tfamp.recipe import load_recipe, quiet_tensorflow, report_exit
from tfamp.recipe.flags import configure, split_settings

# Set for each run by the command: they cannot be set with `--config`.
RESERVED = ("precision", "output_dir", "checkpoint_dir")

# EX_OSERR of sysexits.h: the system has not enough of something.
OUT_OF_MEMORY = 71

_LOOKS_PER_SECOND = 50


def main(argv: Sequence[str] | None = None) -> int:
    """Does the run, and writes its result.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` if None.

    Returns:
        The exit status: as a recipe's own, or `OUT_OF_MEMORY`.
    """
    quiet_tensorflow()
    args, settings = _parse(sys.argv[1:] if argv is None else argv)
    try:
        recipe = load_recipe(args.recipe)
        config = run_config(recipe.Config, settings, args.precision)
        result = _RUNS[_kind(args)](recipe, config, args)
    except (Exception, KeyboardInterrupt) as error:
        if is_out_of_memory(error):
            line = (str(error).splitlines() or [""])[0]
            return _say(f"out of memory: {line}", OUT_OF_MEMORY)
        return report_exit(error)
    from tfamp.files.output import write_atomically

    write_atomically(args.result, json.dumps(result, allow_nan=False) + "\n")
    return 0


def run_config(
    config_class: type, settings: Mapping[str, str], precision: str
) -> Any:
    """The config of one run, which leaves no files.

    Raises:
        InputError: a setting does not fit.
    """
    own = {"precision": precision, "output_dir": "", "checkpoint_dir": ""}
    fields = {field.name for field in dataclasses.fields(config_class)}
    own = {name: text for name, text in own.items() if name in fields}
    return configure(config_class, {**settings, **own})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what ran out, of the device or of the host."""
    # XLA reports that of the device as an internal error.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "ResourceExhaustedError"
        or "RESOURCE_EXHAUSTED" in str(error)
    )


def measure(recipe, config, args) -> dict[str, Any]:
    """Times the steps of a run; returns what this module's docstring says."""
    import tensorflow as tf

    from tfamp.analysis.bench import memory
    from tfamp.analysis.bench.clock import StepTimer
    from tfamp.analysis.bench.feed import Feed
    from tfamp.analysis.bench.product_rate import product_rate
    from tfamp.precision.policy import compute_dtype_of, precision_of

    if args.tf32 == "off":
        tf.config.experimental.enable_tensor_float_32_execution(False)
    peak = []
    feed = Feed()

    def look_at_memory():
        peak.append(memory.peak_bytes(timer.model.distribute_strategy))

    timer = StepTimer(feed, args.steps, between=look_at_memory)
    before = memory.resident_bytes()
    _train(recipe, config, timer, feed.change)
    model = timer.model
    is_cpu = not tf.config.list_physical_devices("GPU")
    result = {
        "precision": args.precision,
        "trained_precision": precision_of(model),
        "tf32": args.tf32,
        "replicas": model.distribute_strategy.num_replicas_in_sync,
        "batch_size": feed.rows,
        **timer.figures(),
        "peak_memory_bytes": peak[0],
        "resident_bytes_before": before if is_cpu else None,
        "product_rate": product_rate(compute_dtype_of(args.precision)),
    }
    return result | (_flops(model, feed) if args.count_flops else {})


def trace(recipe, config, args) -> dict[str, Any]:
    """Leaves a trace of some steps in `args.trace`."""
    from tfamp.analysis.bench.clock import Tracer
    from tfamp.analysis.bench.feed import Feed

    feed = Feed()
    _train(recipe, config, Tracer(feed, args.trace), feed.change)
    return {"precision": args.precision, "trace": args.trace}


def try_batch(recipe, config, args) -> dict[str, Any]:
    """Trains some steps with batches of `args.rows` rows.

    Where resident memory comes to exceed `args.memory_limit`, the process
    ends with `OUT_OF_MEMORY`.
    """
    from tfamp.analysis.bench.clock import Trial
    from tfamp.analysis.bench.feed import rebatched

    if args.memory_limit is not None:
        threading.Thread(
            target=_watch_memory, args=[args.memory_limit], daemon=True
        ).start()
    _train(recipe, config, Trial(), lambda data: rebatched(data, args.rows))
    return {"precision": args.precision, "rows": args.rows}


_RUNS = {"measure": measure, "trace": trace, "try": try_batch}


def _kind(args):
    if args.rows is not None:
        return "try"
    return "measure" if args.trace is None else "trace"


def _train(recipe, config, callback, change_dataset) -> None:
    """Calls the recipe's `train` until the callback leaves it."""
    from tfamp.analysis.bench.clock import FiguresAreIn
    from tfamp.training.observers import Observer, observing

    try:
        with observing(Observer([callback], change_dataset)):
            recipe.train(config)
    except FiguresAreIn:
        return
    raise InputError(
        "The recipe's train ended before enough steps were measured; it must "
        "call tfamp.fit, with more epochs or steps_per_epoch: set "
        "--config.epochs, or measure fewer with --steps."
    )


def _flops(model, feed) -> dict[str, Any]:
    from tfamp.analysis.bench import flops
    from tfamp.hardware.devices import recommend

    multiple = recommend().dimension_multiple
    try:
        products = flops.products_of_step(model, feed.element_spec, feed.rows)
    except flops.UncountableError as error:
        return {"flops_per_step": None, "flops_reason": str(error)}
    return {
        "flops_per_step": flops.total(products),
        "dimension_multiple": multiple,
        "off_multiple": flops.share_off_multiple(products, multiple),
    }


def _watch_memory(limit: int) -> None:
    from tfamp.analysis.bench.memory import resident_bytes

    while (resident_bytes() or 0) <= limit:
        time.sleep(1 / _LOOKS_PER_SECOND)
    _say(f"out of memory: more than {limit / 2**30:g} GiB", OUT_OF_MEMORY)
    sys.stderr.flush()
    # Nothing is kept of a trial, and the main thread may be deep in a step.
    os._exit(OUT_OF_MEMORY)


def _say(line: str, status: int) -> int:
    print(f"tfamp: {line}", file=sys.stderr)
    return status


def _parse(argv) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(prog="tfamp.analysis.bench.run")
    parser.add_argument("recipe")
    parser.add_argument("--precision", required=True)
    parser.add_argument("--tf32", choices=("on", "off"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--count_flops", action="store_true")
    parser.add_argument("--trace")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--memory_limit", type=int)
    parser.add_argument("--result", type=pathlib.Path, required=True)
    settings, argv = split_settings(argv)
    return parser.parse_args(argv), settings


if __name__ == "__main__":
    sys.exit(main())
