"""Optimizer updates in one pass over memory.

Keras writes the update of a weight as a dozen operations, each of which reads
and writes arrays as large as the weight. TensorFlow has kernels with the same
arithmetic that go through memory once. They matter where an update is long
beside the products, as with large models and small batches, and where a step
is short, because each operation of it takes its time to start.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from tfamp import keras_internals
from tfamp.scaling.shards import Shards

_KERNEL_DTYPES = (tf.float32, tf.float64)

# On a CPU the kernel of Adam wakes all threads for weights of more than some
# hundred values, which takes 20 us however few they are. In between Keras's
# operations are quicker (5 us for 1,280 values, 22 us for 16,384; measured on
# 4 cores of an AMD EPYC, TensorFlow 2.21.0), or not much slower.
_SLOW_ADAM_SIZES = range(256, 65536)


@contextlib.contextmanager
def fused_updates(
    optimizer: keras.optimizers.Optimizer, shards: Shards | None = None
) -> Iterator[None]:
    """Within it, `apply` updates each weight by one kernel where there is one.

    That is for dense gradients of float32 weights, with `Adam`, `AdamW` and
    `SGD`, by themselves or in a `MultiOptimizer`. Results equal Keras's to
    rounding. What is not covered, Keras updates as ever.

    Args:
        optimizer: built.
        shards: what it was built on, where that is not the weights themselves:
            it updates a piece as it would update the whole weight.
    """
    with contextlib.ExitStack() as stack:
        for each in keras_internals.single_optimizers(optimizer):
            kernel = _kernel_of(each)
            if kernel is not None or shards is not None:
                stack.enter_context(
                    keras_internals.update_replaced(
                        each, _Update(each, kernel, shards)
                    )
                )
        yield


class _Update:
    """Decays and updates a variable; for one call of `apply`.

    Args:
        optimizer: with its settings and moments.
        kernel: called with the optimizer, the `tf.Variable`, its gradient and
            the scalars of the step; None for the optimizer's own update.
        shards: where the variables are pieces.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        kernel: Callable | None,
        shards: Shards | None = None,
    ):
        self._optimizer = optimizer
        self._kernel = kernel
        self._shards = shards
        # They are the same for all variables on a device.
        self._scalars: dict[tuple, dict[str, tf.Tensor]] = {}

    def __call__(self, gradient, variable, learning_rate) -> None:
        optimizer = self._optimizer
        if self._decays(variable):
            dtype = variable.dtype
            rate = tf.cast(learning_rate, dtype)
            decay = tf.cast(optimizer.weight_decay, dtype)
            variable.assign_sub(
                # Where Keras updates whole weights it also decays them, and
                # multiplies in this order.
                variable * decay * rate
                if self._kernel is None
                else variable * (rate * decay)
            )
        if self._kernel is not None and self._suits(gradient, variable):
            gradient = tf.cast(gradient, variable.dtype)
            scalars = self._scalars_for(variable, learning_rate)
            self._kernel(optimizer, variable, gradient, scalars)
        else:
            type(optimizer).update_step(
                optimizer, gradient, variable, learning_rate
            )

    def _decays(self, variable) -> bool:
        if self._shards is not None:
            return self._shards.decays(variable)
        return keras_internals.decays(self._optimizer, variable)

    def _suits(self, gradient, variable) -> bool:
        # A piece is rounded as the whole weight is, which decides here.
        if self._shards is None:
            is_sparse = isinstance(gradient, tf.IndexedSlices)
            size = variable.shape.num_elements()
        else:
            is_sparse = self._shards.is_sparse(variable)
            size = self._shards.whole_size(variable)
        if is_sparse:
            return False
        is_slow = (
            self._kernel is _adam
            and "CPU" in variable.device
            and size in _SLOW_ADAM_SIZES
        )
        return variable.dtype in _KERNEL_DTYPES and not is_slow

    def _scalars_for(self, variable, learning_rate) -> dict[str, tf.Tensor]:
        graph = tf.compat.v1.get_default_graph()
        key = (id(graph), variable.device, variable.dtype)
        if key not in self._scalars:
            dtype = variable.dtype
            rate = tf.cast(learning_rate, dtype)
            self._scalars[key] = (
                _scalars_of_adam(self._optimizer, rate)
                if isinstance(self._optimizer, keras.optimizers.Adam)
                else {"lr": rate}
            )
        return self._scalars[key]


def _kernel_of(optimizer: keras.optimizers.Optimizer) -> Callable | None:
    """The kernel that does what the optimizer's own methods do, or None."""
    if keras_internals.updates_as(optimizer, keras.optimizers.Adam):
        return None if optimizer.amsgrad else _adam
    if keras_internals.updates_as(optimizer, keras.optimizers.SGD):
        return _momentum if optimizer.momentum else _gradient_descent
    return None


def _scalars_of_adam(adam: keras.optimizers.Adam, rate) -> dict[str, tf.Tensor]:
    """What the kernel takes so that a step is as long as Keras's.

    The kernel weighs a squared gradient by 1 - beta_2 in float32, which is
    5e-5 more than the 0.001 of Keras, and velocities become larger by that in
    the first thousand steps. Rate and epsilon grow with their roots.
    """
    dtype = rate.dtype
    step = tf.cast(adam.iterations + 1, dtype)
    power = tf.pow(tf.cast(adam.beta_2, dtype), step)
    epsilon = tf.cast(adam.epsilon, dtype)
    rounded = float(dtype.as_numpy_dtype(adam.beta_2))
    if 0 < rounded < 1 and rounded != adam.beta_2:
        # 1 - beta_2 ** step of the rounded one, over that of Keras's.
        moved = tf.cast(math.log(adam.beta_2 / rounded), dtype) * step
        root = tf.math.rsqrt(1 - moved * power / (1 - power))
        rate, epsilon = rate * root, epsilon * root
    return {
        "lr": rate,
        "epsilon": epsilon,
        "beta1_power": tf.pow(tf.cast(adam.beta_1, dtype), step),
        "beta2_power": power,
    }


def _adam(adam, variable, gradient, scalars) -> None:
    momentum, velocity = keras_internals.adam_moments(adam, variable)
    dtype = variable.dtype
    tf.raw_ops.ResourceApplyAdam(
        var=variable.handle,
        m=momentum.handle,
        v=velocity.handle,
        beta1=tf.cast(adam.beta_1, dtype),
        beta2=tf.cast(adam.beta_2, dtype),
        grad=gradient,
        **scalars,
    )


def _momentum(sgd, variable, gradient, scalars) -> None:
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=variable.handle,
        accum=keras_internals.sgd_momentum(sgd, variable).handle,
        momentum=tf.cast(sgd.momentum, variable.dtype),
        use_nesterov=sgd.nesterov,
        grad=gradient,
        **scalars,
    )


def _gradient_descent(sgd, variable, gradient, scalars) -> None:
    del sgd
    tf.raw_ops.ResourceApplyGradientDescent(
        var=variable.handle, alpha=scalars["lr"], delta=gradient
    )
