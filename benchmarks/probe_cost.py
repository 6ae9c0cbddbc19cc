"""What a probed training step costs, as a ratio to the same step not probed.

    python -m benchmarks.probe_cost --steps=40 --rounds=5

The image recipe in float32, and the same model probed; both in graph calls of
one step, in turns, the first call of each, which traces, left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import keras
import tensorflow as tf

from recipes import image_classification
from tfamp.analysis.probe import steps as probe_steps
from tfamp.analysis.probe.counter import Step
from tfamp.distribute.strategy import distribute_batches
from tfamp.recipe.flags import configure
from tfamp.recipe.subject import open_subject
from tfamp.step import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = configure(image_classification.Config, {"precision": "float32"})
    subject = open_subject(image_classification, config)
    # In memory, so that augmentation is no part of a step.
    batches = subject.train_batches.take(1).cache().repeat()
    probe_steps.prepare(subject.model, batches)

    begin = time.perf_counter()
    with probe_steps.counting(subject.model, Step()) as count:
        count(batches, 1)
        print(f"tracing, probed: {time.perf_counter() - begin:.1f} s")
        begin = time.perf_counter()
        plain = _plain_steps(subject.model, batches)
        plain(1)
        print(f"tracing, plain:  {time.perf_counter() - begin:.1f} s")
        ratios = []
        for _ in range(args.rounds):
            probed_ms = _milliseconds(lambda n: count(batches, n), args.steps)
            plain_ms = _milliseconds(plain, args.steps)
            ratios.append(probed_ms / plain_ms)
            print(
                f"probed {probed_ms:6.1f} ms, plain {plain_ms:6.1f} ms, "
                f"ratio {ratios[-1]:.2f}"
            )
    print(f"median ratio {statistics.median(ratios):.2f}")


def _plain_steps(
    model: keras.Model, batches: tf.data.Dataset
) -> Callable[[int], None]:
    """A function that runs that many steps, as probing runs them."""
    strategy = model.distribute_strategy
    train_step = build.train_step(model, strategy, microbatches=1, jit=False)

    @tf.function
    @tf.autograph.experimental.do_not_convert
    def one_step(iterator) -> tf.Tensor:
        strategy.run(train_step, args=(iterator.get_next(),))
        return model.optimizer.iterations.value + 0

    def run(number: int) -> None:
        iterator = iter(distribute_batches(strategy, batches.take(number)))
        for _ in range(number):
            done = one_step(iterator)
        done.numpy()

    return run


def _milliseconds(run: Callable[[int], object], number: int) -> float:
    begin = time.perf_counter()
    run(number)
    return (time.perf_counter() - begin) / number * 1e3


if __name__ == "__main__":
    main()
