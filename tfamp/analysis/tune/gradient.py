"""The gradient of a whole step, for any choice of units in 16 bits."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfamp import keras_internals
from tfamp.accumulation.trace import summing_in_float32
from tfamp.analysis.probe import counter
from tfamp.analysis.probe import steps as probe_steps
from tfamp.analysis.tune.draws import drawn_alike
from tfamp.analysis.tune.switch import Switch
from tfamp.distribute.strategy import distribute_batches
from tfamp.errors import InputError
from tfamp.layers.float8 import multiplying_8_bits
from tfamp.precision.computing import computing_in
from tfamp.scaling import gradients as gradients_lib
from tfamp.step import build
from tfamp.taps.gates import gate
from tfamp.training.evaluation import graph_calls


class Gradients:
    """Gradients of some batches, against those in float32.

    A step changes nothing: none is applied, and what forward passes move, draw
    and count is put back, so that each run sees the same numbers.

    Attributes:
        runs: steps that were run.
        noise: how far the gradient of one batch is from their mean, relative
            to its length.
        repeat_error: how far a second run in float32 is from the first.
    """

    def __init__(
        self,
        model: keras.Model,
        dataset: tf.data.Dataset,
        steps: int,
        switch: Switch,
        units: int,
        microbatches: int = 1,
    ):
        self._model = model
        self._switch = switch
        self._units = units
        self._microbatches = microbatches
        self._plan = probe_steps.plan_of_step(model, dataset, microbatches)
        self._thread = threading.local()
        self._run = tf.function(summing_in_float32(self._step), autograph=False)
        strategy = model.distribute_strategy
        self._shares = list(distribute_batches(strategy, dataset.take(steps)))
        if len(self._shares) < 2:
            raise InputError(
                f"The dataset holds {len(self._shares)} batches; the noise of "
                "a gradient takes at least 2."
            )
        self.runs = 0
        self.noise = self.repeat_error = 0.0
        self._right: list[tf.Tensor] = []
        self._size = 1.0

    def start(self) -> None:
        """Measures the gradients in float32, and their noise.

        Raises:
            InputError: they are 0, or not finite.
        """
        self._right = [self._gradient(s, (), 1.0) for s in self._shares]
        lengths = [self._length(g) ** 2 for g in self._right]
        self._size = float(np.sqrt(np.mean(lengths)))
        if not np.isfinite(self._size) or not self._size:
            raise InputError(
                "The gradient in float32 is "
                f"{'0' if self._size == 0 else 'not finite'}: no precision "
                "mends that."
            )
        mean = tf.add_n(self._right) / len(self._right)
        off = [self._length(g - mean) ** 2 for g in self._right]
        self.noise = float(np.sqrt(sum(off) / (len(off) - 1))) / self._size
        self.repeat_error = self.error(())

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self._shares)

    def error(self, narrow, scale: float = 1.0) -> float:
        """The relative error with these units in 16 bits; inf: not finite.

        Args:
            narrow: indices of units.
            scale: multiplies the loss, and the gradient is divided by it.
        """
        return self._error_of(lambda s: self._gradient(s, narrow, scale))

    def plain(
        self,
        layers: Sequence[keras.layers.Layer],
        policy: str,
        eight_bits: Sequence[keras.layers.Layer] = (),
    ) -> "Plain":
        """The model itself, with these layers in another policy, no switch."""
        return Plain(self, layers, policy, eight_bits)

    def _error_of(self, gradient: Callable[[Any], tf.Tensor]) -> float:
        total = 0.0
        for share, right in zip(self._shares, self._right, strict=True):
            off = self._length(gradient(share) - right)
            if not np.isfinite(off):
                return float("inf")
            total += off**2
        return float(np.sqrt(total / len(self._shares))) / self._size

    @staticmethod
    def _length(vector: tf.Tensor) -> float:
        return float(tf.norm(vector))

    def _gradient(self, share, narrow, scale: float) -> tf.Tensor:
        self.runs += 1
        mask = np.zeros(self._units, bool)
        mask[list(narrow)] = True
        result = self._run(share, tf.constant(mask), tf.constant(scale))
        strategy = self._model.distribute_strategy
        return strategy.experimental_local_results(result)[0]

    def _step(self, share, mask, scale):
        model = self._model
        strategy = model.distribute_strategy
        step = probe_steps.step_of(model, self._plan, self._microbatches)

        def on_replica(share):
            forget = build.remember(self._moving())
            taken: list[tuple] = []
            self._thread.now = taken, scale
            try:
                with (
                    contextlib.nullcontext()
                    if mask is None
                    else self._switch.set(mask)
                ):
                    step(share)
            finally:
                self._thread.now = None
            gradients, overwrites = zip(*taken, strict=True)
            summed = gradients_lib.all_reduce(gradients, overwrites)
            parts = [
                tf.reshape(tf.cast(tf.convert_to_tensor(g), tf.float32), [-1])
                / scale
                for g, overwrite in zip(summed, overwrites, strict=True)
                if not overwrite
            ]
            with tf.control_dependencies(parts):
                forget()
            return tf.concat(parts, 0)

        return strategy.run(on_replica, args=(share,))

    def _moving(self) -> list:
        """What a step changes without its optimizer."""
        variables = [
            *self._model.non_trainable_variables,
            *self._model.metrics_variables,
        ]
        generator = keras_internals.global_seed_generator(create=False)
        if generator is not None:
            variables.append(generator.state)
        return list({id(v): v for v in variables}.values())

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the optimizers hand over what they get."""
        with contextlib.ExitStack() as stack:
            for each in counter.optimizers_of(self._model):
                apply = functools.partial(self._apply, each)
                stack.enter_context(gate(each, "apply", apply))
                stack.enter_context(gate(each, "scale_loss", self._scale_loss))
            yield

    def _apply(self, optimizer, call, grads, variables=None):
        now = getattr(self._thread, "now", None)
        if now is None:
            return call(grads, variables)
        if variables is None:
            variables = keras_internals.optimized_variables(optimizer)
        now[0].extend(
            (gradient, keras_internals.overwrites_with_gradient(variable))
            for gradient, variable in zip(grads, variables, strict=True)
            if gradient is not None
        )
        return None

    def _scale_loss(self, call, loss):
        now = getattr(self._thread, "now", None)
        if now is None:
            return call(loss)
        return tf.cast(loss, tf.float32) * now[1]


class Plain:
    """A step in which some layers compute in a policy, traced as it is.

    Args:
        gradients: of the model.
        layers: those that are not in float32.
        policy: theirs.
        eight_bits: those that multiply 8-bit numbers.
    """

    def __init__(
        self,
        gradients: Gradients,
        layers: Sequence[keras.layers.Layer],
        policy: str,
        eight_bits: Sequence[keras.layers.Layer],
    ):
        self._gradients = gradients
        self._eight_bits = list(eight_bits)
        self._layers = list(layers)
        self._policy = policy
        self._run = tf.function(
            summing_in_float32(
                lambda share, scale: gradients._step(share, None, scale)
            ),
            autograph=False,
        )

    def error(self, scale: float) -> float:
        """As `Gradients.error`."""
        return self._gradients._error_of(lambda s: self._gradient(s, scale))

    def milliseconds(self) -> float:
        """What a forward and a backward pass take."""
        began = time.perf_counter()
        float(self._gradient(self._gradients._shares[0], 1.0)[0])
        return 1e3 * (time.perf_counter() - began)

    def _gradient(self, share, scale: float) -> tf.Tensor:
        gradients = self._gradients
        gradients.runs += 1
        with (
            computing_in(self._policy, self._layers),
            multiplying_8_bits(self._eight_bits),
        ):
            result = self._run(share, tf.constant(scale))
        strategy = gradients._model.distribute_strategy
        return strategy.experimental_local_results(result)[0]


@contextlib.contextmanager
def gradients_of(
    model: keras.Model,
    dataset: tf.data.Dataset,
    steps: int,
    switch: Switch,
    units: int,
    microbatches: int = 1,
) -> Iterator[Gradients]:
    """Within it, gradients with any units in 16 bits can be asked for.

    Args:
        model: prepared, its layers in float32; to be within
            `probe_steps.unchanged`.
        dataset: global batches.
        steps: how many of them, at most.
        switch: of the model.
        units: how many it switches.
        microbatches: pieces of a replica's share.
    """
    gradients = Gradients(model, dataset, steps, switch, units, microbatches)
    with (
        probe_steps.one_optimizer_for_all(model),
        # Before the switch, which stands around it.
        drawn_alike(model),
        switch.attached(),
        graph_calls(model),
        gradients.attached(),
    ):
        gradients.start()
        yield gradients
