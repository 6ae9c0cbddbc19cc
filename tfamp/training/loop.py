"""Many steps in one graph call."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.accumulation.trace import summing_in_float32
from tfamp.distribute.new_variables import made_outside_of_graphs
from tfamp.distribute.strategy import computes_on_gpus, devices_of
from tfamp.overflow.kept_step import KeptStep
from tfamp.step.build import Logs, Step

# Added to the steps of a call that an event ended.
_EVENT = 2**30


class Loop:
    """Runs many steps in one graph call, with no Python between them.

    Args:
        step: what each replica runs on its share.
        strategy: what it runs under.
        eager: keeps TensorFlow from making a graph of it.
        kept: watches training steps: a call ends early, right after a step
            that was skipped or that moved a scale.
        is_narrow: whether something is computed in 16 bits, whose sums are
            then made in float32.
        on_trace: called after each call that traced.

    Attributes:
        steps: steps done so far, by all calls since `begin`.
        has_event: whether `kept` saw something in the last step.
        graph: what was traced last.
        kept: as it was given.
    """

    def __init__(
        self,
        step: Step,
        strategy: tf.distribute.Strategy,
        eager: bool = False,
        kept: KeptStep | None = None,
        is_narrow: bool = False,
        on_trace: Callable[[], None] = lambda: None,
    ):
        self.steps = 0
        self.has_event = False
        self.graph: tf.Graph | None = None
        self.kept = kept
        self._on_trace = on_trace
        # Where the rows of a batch are counted; the host looks at times only.
        device = devices_of(strategy)[0]
        with tf.device(device if computes_on_gpus(strategy) else "CPU:0"):
            # Survives the error that ends a dataset in the middle of a call.
            self._done = tf.Variable([0, 0], dtype=tf.int64, trainable=False)
        self._logs: dict[str, tf.Variable] = {}

        @tf.autograph.experimental.do_not_convert
        def one_step(iterator) -> tf.Tensor | None:
            share = iterator.get_next()
            rows = strategy.experimental_local_results(share.batch_rows)[0]
            with _after(rows):
                if kept is not None:
                    kept.keep(share)
                logs = strategy.run(step_on, args=(share,))
                has_event = None if kept is None else kept.has_event()
                self._keep(strategy, logs)
                self._done.assign_add(tf.stack([tf.ones_like(rows), rows]))
            return has_event

        @tf.autograph.experimental.do_not_convert
        def step_on(share) -> Logs:
            with _after(share.batch_rows):
                return step(share)

        @tf.autograph.experimental.do_not_convert
        def many_steps(iterator, steps) -> tf.Tensor:
            def body(i):
                has_event = one_step(iterator)
                if has_event is None:
                    return i + 1
                # On the host, as the count itself is: a GPU would choose for
                # it, and be waited for once more.
                with tf.device("CPU:0"):
                    # Beyond any number of steps: it ends the loop.
                    return i + tf.where(has_event, 1 + _EVENT, 1)

            self.graph = tf.compat.v1.get_default_graph()
            with tensorflow_internals.differentiated_within():
                # One at a time: where the data end, the step before is whole.
                (end,) = tf.while_loop(
                    lambda i: i < steps, body, [0], parallel_iterations=1
                )
            return end

        def many_steps_eagerly(iterator, steps) -> int:
            for i in range(int(steps)):
                if one_step(iterator):
                    return i + 1 + _EVENT
            return int(steps)

        if eager:
            self._many_steps = many_steps_eagerly
        else:
            self._many_steps = tensorflow_internals.graph_function(
                summing_in_float32(many_steps) if is_narrow else many_steps,
                relaxes=True,
            )

    def begin(self) -> None:
        """Counts from zero again, where the loop has served before."""
        self.steps = 0
        self.has_event = False
        self._done.assign([0, 0])

    @property
    def examples(self) -> int:
        """Rows of the global batches of all steps so far."""
        return int(self._done.numpy()[1])

    @property
    def logs(self) -> dict[str, Any]:
        """What the last step returned: the mean over replicas."""
        logs = {name: each.numpy() for name, each in self._logs.items()}
        return {n: v if v.ndim else float(v) for n, v in logs.items()}

    def run(self, iterator, steps: int) -> bool:
        """Runs that many steps, or up to an event; False where data ended."""
        before = self.graph
        try:
            end = int(self._many_steps(iterator, tf.constant(steps)))
        except tf.errors.OutOfRangeError:
            # The step before was no event, or the call had ended with it.
            self.has_event = False
            self.steps = int(self._done.numpy()[0])
            return False
        finally:
            if self.graph is not before:
                self._on_trace()
        self.has_event = end > _EVENT
        self.steps += end % _EVENT
        return True

    def _keep(self, strategy: tf.distribute.Strategy, logs: Logs) -> None:
        for name, value in logs.items():
            # Collectives have no mean of booleans, nor one of 8 bits.
            number = strategy.run(tf.cast, args=(value, tf.float32))
            shape = strategy.experimental_local_results(number)[0].shape
            if not shape.is_fully_defined():
                # As many as the replica has rows: no mean has them.
                continue
            mean = strategy.reduce("MEAN", number, axis=None)
            if name not in self._logs:
                zeros = np.zeros(shape, "float32")
                self._logs[name] = made_outside_of_graphs(
                    functools.partial(tf.Variable, zeros, trainable=False)
                )
            self._logs[name].assign(mean)


def _after(tensor: tf.Tensor) -> contextlib.AbstractContextManager:
    """Within it nothing runs in a graph before that tensor is there.

    Where the data end, operations that need nothing of the batch would run
    for a step that does not come: those that draw, count and log.
    """
    if tf.executing_eagerly():
        return contextlib.nullcontext()
    return tf.control_dependencies([tensor])
