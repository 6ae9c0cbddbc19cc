"""Of the last step: its batch, and the state before it.

A skipped step leaves weights and optimizers as they were, bit for bit. With
what is kept here the host can therefore run the very same step again.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.distribute.new_variables import made_outside_of_graphs
from tfamp.distribute.strategy import Share, devices_of
from tfamp.scaling.optimizer import LossScaleOptimizer


class KeptStep:
    """Watches steps in the graph: each is kept until the next one begins.

    The loop ends with the step that was skipped, which is then still here.

    Args:
        model: compiled and built.
        optimizers: those whose skips and scales count, by name.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizers: Mapping[str, LossScaleOptimizer],
    ):
        self._model = model
        self._strategy = model.distribute_strategy
        self._optimizers = list(optimizers.values())
        # By local replica: a variable for each tensor, of any shape.
        self._slots: list[list[tf.Variable]] = []
        self._structure: Any = None
        dtype = keras.random.SeedGenerator(0).state.dtype
        self._no_generator = tf.zeros([0], dtype)

    def state(self) -> list[tf.Tensor]:
        """What a skipped step changes all the same, in replica context.

        The scales, and what it draws from or counts with.
        """
        scales = [each.dynamic_scale for each in self._optimizers]
        state = [
            tf.convert_to_tensor(variable)
            for variable in [*scales, *self._random_variables()]
        ]
        # The step itself may make it, and then is traced a second time, when
        # it is too late for another slot.
        if keras_internals.global_seed_generator(create=False) is None:
            state.append(self._no_generator)
        return state

    def assign_random_state(self, state: list[tf.Tensor]) -> None:
        """Of what `state` returned, puts back all but the scales."""
        values = state[len(self._optimizers) :]
        # A generator that came to be in the step has no state to put back.
        for variable, value in zip(
            self._random_variables(), values, strict=False
        ):
            if value.shape == variable.shape:
                variable.assign(value)

    def keep(self, share: Share) -> None:
        """Keeps the step that begins, in cross-replica context.

        A variable takes over the buffer of a tensor that is assigned to it:
        nothing is copied, and the batch before is let go.

        Args:
            share: what the replicas got.
        """
        state = self._strategy.run(self.state)
        devices = devices_of(self._strategy)
        local = self._strategy.experimental_local_results((share, state))
        self._structure = local[0]
        for i, (device, values) in enumerate(zip(devices, local, strict=True)):
            tensors = _tensors(values)
            if len(self._slots) <= i:
                make = functools.partial(_empty_slots, tensors, device)
                self._slots.append(made_outside_of_graphs(make))
            with tf.device(device):
                for slot, tensor in zip(self._slots[i], tensors, strict=True):
                    slot.assign(tensor)

    def forget(self) -> None:
        """Lets the batch go that is kept, and its memory."""
        for slot in itertools.chain.from_iterable(self._slots):
            slot.assign(tf.zeros([], slot.dtype))

    def has_event(self) -> tf.Tensor:
        """Whether the step that ends was skipped or a scale grew.

        Returns:
            A boolean scalar on the host, equal on all workers.
        """
        # On the host, which decides whether the loop goes on.
        with tf.device("CPU:0"):
            # The count of clean steps begins anew with both. A fixed scale
            # has no such count.
            flags = [
                tf.equal(each.step_counter, 0)
                if each.dynamic
                else each.consecutive_skips > 0
                for each in self._optimizers
            ]
            return functools.reduce(tf.logical_or, flags)

    def load(self) -> tuple[Share, list[tf.Tensor]]:
        """The step that was kept: share and state of each replica."""
        kept = iter(
            [
                _packed(self._structure, [slot.value() for slot in slots])
                for slots in self._slots
            ]
        )
        return self._strategy.experimental_distribute_values_from_function(
            lambda _: next(kept)
        )

    def scales(self) -> list[float]:
        """The scale of each optimizer in the step that was kept."""
        values = [slot.value() for slot in self._slots[0]]
        _, state = _packed(self._structure, values)
        return [float(scale) for scale in state[: len(self._optimizers)]]

    def _random_variables(self) -> list[keras.Variable]:
        """Seeds, and what else moves by itself and is no moving average."""
        variables = [
            variable
            for variable in self._model.non_trainable_variables
            if not keras.backend.is_float_dtype(variable.dtype)
        ]
        generator = keras_internals.global_seed_generator(create=False)
        return variables if generator is None else [*variables, generator.state]


def _tensors(values: Any) -> list[tf.Tensor]:
    flat = tf.nest.flatten(values, expand_composites=True)
    return [tensor for tensor in flat if tensor is not None]


def _packed(structure: Any, tensors: list[tf.Tensor]) -> Any:
    flat = tf.nest.flatten(structure, expand_composites=True)
    values = iter(tensors)
    return tf.nest.pack_sequence_as(
        structure,
        [None if each is None else next(values) for each in flat],
        expand_composites=True,
    )


def _empty_slots(tensors: list[tf.Tensor], device: str) -> list[tf.Variable]:
    with tf.device(device):
        return [
            tf.Variable(
                tf.zeros([], tensor.dtype),
                shape=tf.TensorShape(None),
                trainable=False,
            )
            for tensor in tensors
        ]
