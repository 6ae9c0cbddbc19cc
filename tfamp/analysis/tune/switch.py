"""A model of which every unit computes in either precision, as a switch says.

All is traced once, with both branches of each unit. What passes between units
is float32, and holds what 16 bits held where the unit before computed in them,
so that the numbers are those of a model whose layers have these precisions.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.analysis.tune.units import Unit
from tfamp.layers.float8 import call_of, multiplying_8_bits
from tfamp.taps.gates import gate
from tfamp.taps.passing import map_floats

_DTYPES_16 = (tf.float16, tf.bfloat16)


class Switch:
    """Switches the units of a model that computes in float32.

    Args:
        units: what is switched.
        policy: the dtype policy of a unit that is on.
        eight_bits: layers that multiply 8-bit numbers then.

    Attributes:
        called: indices of the units that a step called.
        failed: the unit whose own code, among the layers in it, can be traced
            in float32 and not in 16 bits; None where none did.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        policy: keras.dtype_policies.DTypePolicy,
        eight_bits: Sequence[keras.layers.Layer] = (),
    ):
        self._eight_bits = {id(layer) for layer in eight_bits}
        self._units = units
        self._policy = policy
        # Replicas are traced in threads of their own.
        self._thread = threading.local()
        self.called: set[int] = set()
        self.failed: Unit | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the switch stands in the way of the units' calls."""
        losing = {id(layer): layer for u in self._units for layer in u.inside}
        with contextlib.ExitStack() as stack:
            for i, unit in enumerate(self._units):
                around = functools.partial(self._call, i)
                stack.enter_context(gate(unit.layer, "call", around))
            for layer in losing.values():
                around = functools.partial(self._add_loss, layer)
                stack.enter_context(gate(layer, "add_loss", around))
            yield

    @contextlib.contextmanager
    def set(self, mask: tf.Tensor) -> Iterator[None]:
        """Within it, in this thread, units are switched.

        Args:
            mask: boolean, one a unit: whether it computes in 16 bits.
        """
        self._thread.mask, self._thread.losses = mask, None
        self._thread.returned = {}
        try:
            yield
        finally:
            del self._thread.mask, self._thread.returned

    def _call(self, i: int, call, /, *args, **kwargs):
        mask = getattr(self._thread, "mask", None)
        unit = self._units[i]
        if mask is None:
            return call_of(unit.layer, call)(*args, **kwargs)
        self.called.add(i)
        wide = _Branch(call, args, kwargs)
        narrow = _Branch(
            functools.partial(self._narrow, unit, call), args, kwargs
        )
        # Losses that a branch adds cannot leave it by themselves.
        outer = self._thread.losses
        traced: list[_Branch] = []

        def run(branch: "_Branch") -> list[Any]:
            self._thread.losses = branch.losses
            try:
                tensors = branch()
            except Exception:
                # What fails in float32 too is a fault of another kind.
                if traced and len(unit.inside) > len(unit.layers):
                    self.failed = self.failed or unit
                raise
            finally:
                self._thread.losses = outer
            traced.append(branch)
            return tensors

        # TensorFlow traces the first one first.
        values = tf.cond(
            tf.logical_not(mask[i]),
            functools.partial(run, wide),
            functools.partial(run, narrow),
        )
        outputs, losses = wide.packed(values)
        for layer, loss in losses:
            layer.add_loss(loss)
        # Kept, so that no other tensor gets one's id.
        leaves = keras.tree.flatten(outputs)
        self._thread.returned |= {id(leaf): leaf for leaf in leaves}
        return outputs

    def _narrow(self, unit: Unit, call, *args, **kwargs):
        layer = unit.layer
        eight_bits = [
            each for each in unit.layers if id(each) in self._eight_bits
        ]
        with (
            keras_internals.dtype_policy_replaced(
                list(unit.layers), self._policy
            ),
            multiplying_8_bits(eight_bits),
        ):
            call = call_of(layer, call)
            if not any(layer is each for each in unit.layers):
                # It is kept in float32; what is in it is not.
                return call(*args, **kwargs)
            dtype = layer.compute_dtype
            # A layer that takes its inputs as they come gets those of 16 bits
            # where another layer returned them.
            returned = self._thread.returned

            def rounded(i: int, count: int, value: tf.Tensor) -> tf.Tensor:
                is_cast = layer.autocast or id(value) in returned
                return tf.cast(value, dtype) if is_cast else value

            args, kwargs = map_floats(rounded, (args, kwargs))
            with keras_internals.autocast_scope(dtype):
                return call(*args, **kwargs)

    def _add_loss(self, layer, call, loss):
        branch = getattr(self._thread, "losses", None)
        if branch is None:
            return call(loss)
        branch += [(layer, each) for each in keras.tree.flatten(loss)]
        return None


class _Branch:
    """A call whose tensors can be those of a branch."""

    def __init__(self, call: Callable, args: tuple, kwargs: dict):
        self._call = functools.partial(call, *args, **kwargs)
        self.losses: list[tuple[keras.layers.Layer, tf.Tensor]] = []

    def __call__(self) -> list[Any]:
        self.losses.clear()
        outputs = self._call()
        leaves = keras.tree.flatten(outputs)
        self._is_tensor = [tf.is_tensor(leaf) for leaf in leaves]
        self._structure, self._leaves = outputs, leaves
        tensors = [leaf for leaf in leaves if tf.is_tensor(leaf)]
        tensors += [loss for _, loss in self.losses]
        return [_widened(each) for each in tensors]

    def packed(self, values: Any) -> tuple[Any, list]:
        """What the call returned, and its losses, in the outer graph."""
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        rest = iter(values)
        leaves = [
            next(rest) if is_tensor else leaf
            for is_tensor, leaf in zip(
                self._is_tensor, self._leaves, strict=True
            )
        ]
        outputs = keras.tree.pack_sequence_as(self._structure, leaves)
        losses = [(layer, next(rest)) for layer, _ in self.losses]
        return outputs, losses


def _widened(tensor: Any) -> Any:
    if isinstance(tensor, tf.RaggedTensor):
        return tensor.with_flat_values(_widened(tensor.flat_values))
    if isinstance(tensor, tf.SparseTensor):
        return tf.SparseTensor(
            tensor.indices, _widened(tensor.values), tensor.dense_shape
        )
    if tensor.dtype in _DTYPES_16:
        return tf.cast(tensor, tf.float32)
    return tf.identity(tensor)
