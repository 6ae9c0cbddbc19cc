"""What masters and moments in shards save and cost, beside whole ones.

    python -m benchmarks.shards [--replicas=1,2,4,8] [--width=1024]

For each number of replicas, one process without and one with shards train a
stack of dense layers in mixed_bfloat16 with Adam on as many logical devices of
the CPU. Printed are, for each weight and replica: the bytes of the variables
that one replica holds, against 2 + 12/R; those by which the process grew, at
its peak and after the last step; what collectives carry in a step, counted in
the graph, and what a replica sends for that in a ring. And, from one process
in which the two take turns, the time of a step in shards as a ratio to that
without: a median, between quartiles.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

from benchmarks import program
from tfamp.errors import InputError
from tfamp.recipe import flag

_LAYERS, _BATCH = 8, 16
_WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    replicas: str = flag("1,2,4,8", "numbers of replicas, a comma list")
    width: int = flag(1024, "of each of 8 dense layers", minimum=8)
    steps: int = flag(8, "timed steps of each of the two", minimum=2)
    part: str = flag("", "measure this only, in this process: used inside")


def measure(config: Config) -> None:
    """Runs one process for each figure, and prints the tables."""
    if config.part:
        print(json.dumps(_PARTS[config.part](config)))
        return
    try:
        counts = [int(each) for each in config.replicas.split(",")]
    except ValueError:
        raise InputError(
            f"--replicas={config.replicas}; expected numbers, as 1,2."
        ) from None
    print(
        "| R | | theory | variables | peak | after | given to | sent | time |"
    )
    print("|--:|:--|--:|--:|--:|--:|:--|--:|:--|")
    for count in counts:
        found = {
            part: _in_a_process(config, count, part)
            for part in ("whole", "shards", "turns")
        }
        for name in ("whole", "shards"):
            row = found[name]
            theory = 2 + 12 / count if name == "shards" else 12
            given = ", ".join(
                f"{kind} {size:.2f}" for kind, size in row["given"].items()
            )
            time_ratio = "1"
            if name == "shards":
                low, middle, high = found["turns"]["quartiles"]
                time_ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            print(
                f"| {count} | {name} | {theory:.2f} | {row['variables']:.3f} "
                f"| {row['peak']:.1f} | {row['after']:.1f} | {given or '-'} "
                f"| {row['sent']:.2f} | {time_ratio} |",
                flush=True,
            )


def _in_a_process(config: Config, count: int, part: str) -> dict:
    command = [
        *(sys.executable, "-m", "benchmarks.shards", f"--part={part}"),
        *(f"--replicas={count}", f"--width={config.width}"),
        f"--steps={config.steps}",
    ]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def _alone(config: Config, shard: bool) -> dict:
    """Bytes of one of the two, which has the process for itself."""
    strategy = _strategy(int(config.replicas))
    before = _resident_bytes()
    model, step = _training(config, strategy, shard)
    with step as run:
        for _ in range(_WARM_UP):
            run()
        graph = run.function.get_concrete_function().graph
        sizes = [_local_bytes(strategy, each) for each in _variables(model)]
        after = _resident_bytes()
    weights = sum(math.prod(w.shape) for w in model.trainable_variables)
    replicas = strategy.num_replicas_in_sync
    given, sent = _carried(graph, replicas, weights // replicas)
    return {
        "variables": sum(sizes) / weights,
        "peak": (_peak_bytes() - before) / weights / replicas,
        "after": (after - before) / weights / replicas,
        "given": {kind: size / weights for kind, size in given.items()},
        "sent": sent / weights,
    }


def _take_turns(config: Config) -> dict:
    """Quartiles of the ratio of times, over pairs of steps."""
    strategy = _strategy(int(config.replicas))
    (_, whole), (_, shards) = (
        _training(config, strategy, shard) for shard in (False, True)
    )
    with whole as run_whole, shards as run_shards:
        ratios = []
        for i in range(_WARM_UP + config.steps):
            seconds = []
            for run in (run_whole, run_shards):
                began = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - began)
            if i >= _WARM_UP:
                ratios.append(seconds[1] / seconds[0])
    return {"quartiles": statistics.quantiles(ratios, method="inclusive")}


_PARTS = {
    "whole": lambda config: _alone(config, shard=False),
    "shards": lambda config: _alone(config, shard=True),
    "turns": _take_turns,
}


def _strategy(count: int):
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * count,
    )
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])


def _training(config: Config, strategy, shard: bool):
    """A model, and a context in which a function trains it by one step."""
    import keras
    import tensorflow as tf

    import tfamp
    from tfamp import keras_internals
    from tfamp.distribute.strategy import Share
    from tfamp.step import build
    from tfamp.training.narrow_weights import in_16_bits

    tfamp.set_precision("mixed_bfloat16")
    spec = (tf.TensorSpec([_BATCH, config.width]),) * 2
    with strategy.scope():
        model = keras.Sequential([keras.Input([config.width])])
        for _ in range(_LAYERS):
            model.add(keras.layers.Dense(config.width, use_bias=False))
        optimizer = tfamp.wrap_optimizer(keras.optimizers.Adam(), shard=shard)
        model.compile(optimizer, "mse", auto_scale_loss=False)
        keras_internals.build_everything(model, spec)
    rows = tf.ones([_BATCH, config.width])
    counts = tf.constant([_BATCH, _BATCH * strategy.num_replicas_in_sync])
    share = Share((rows, rows), *tf.unstack(tf.cast(counts, tf.int64)))

    @contextlib.contextmanager
    def stepping():
        with in_16_bits(model, spec):
            train_step = build.train_step(
                model, strategy, microbatches=1, jit=False
            )

            @tf.function(autograph=False)
            def step():
                strategy.run(train_step, (share,))

            def run() -> None:
                step()
                # Waits for the update.
                strategy.experimental_local_results(optimizer.iterations.value)[
                    0
                ].numpy()

            run.function = step
            yield run

    return model, stepping()


def _variables(model) -> list:
    from tfamp import keras_internals

    return [
        keras_internals.stored(each)
        for each in (
            *model.trainable_variables,
            *model.optimizer.inner_optimizer.variables,
            *(model.optimizer.shards.masters if model.optimizer.shards else ()),
        )
    ]


def _local_bytes(strategy, variable) -> int:
    local = strategy.experimental_local_results(variable)[0]
    return local.shape.num_elements() * local.dtype.size


def _carried(
    graph, replicas: int, elements_of_a_piece: int
) -> tuple[dict[str, int], float]:
    """What one replica gives to collectives, and sends for them in a ring."""
    given: dict[str, int] = {}
    sent = 0.0
    for operation in graph.get_operations():
        if not operation.type.startswith("Collective"):
            continue
        if not operation.device.endswith("CPU:0"):
            continue
        tensor = operation.inputs[0]
        name = operation.type.removeprefix("Collective").removesuffix("V2")
        key = f"{name.lower()} {tensor.dtype.name}"
        # Pieces of weights are gathered, and their number is not in the graph.
        count = tensor.shape.num_elements() or elements_of_a_piece
        size = count * tensor.dtype.size
        given[key] = given.get(key, 0) + size
        rounds = 2 / replicas if name == "Reduce" else 1
        sent += rounds * (replicas - 1) * size
    return given, sent


def _resident_bytes() -> int:
    fields = pathlib.Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(program.run(Config, measure, __doc__, sys.argv[1:]))
