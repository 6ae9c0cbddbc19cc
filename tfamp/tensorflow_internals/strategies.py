"""What a strategy numbers its collectives by, and begins its variables with."""

import functools
import itertools
import weakref
from collections.abc import Callable

import tensorflow as tf

_KEYS_OF_A_STRATEGY = 100_000
_collective_key_bases = itertools.count(
    _KEYS_OF_A_STRATEGY, _KEYS_OF_A_STRATEGY
)
_with_own_collectives: weakref.WeakSet[tf.distribute.Strategy] = (
    weakref.WeakSet()
)


def separate_collectives(strategy: tf.distribute.Strategy) -> None:
    """Numbers a MirroredStrategy's collectives apart from all others' here.

    TensorFlow starts each strategy of a process at the same number, and takes
    the sums of a second one, made when a cell of a notebook runs again or for
    another number of devices, for those of the first: it aborts all of them
    where shapes differ.
    """
    if (
        not isinstance(strategy, tf.distribute.MirroredStrategy)
        or strategy in _with_own_collectives
    ):
        return
    _with_own_collectives.add(strategy)
    extended = strategy.extended
    before = extended._collective_ops
    extended._collective_key_base = next(_collective_key_bases)
    extended._collective_ops = extended._make_collective_ops_with_fallbacks()
    if extended._cross_device_ops is before:
        extended._cross_device_ops = extended._collective_ops


def replace_first_values(
    strategy: tf.distribute.Strategy, function: Callable
) -> None:
    """Has a function say what a replica's variable begins with.

    TensorFlow has no public place for it: the method is replaced on this one
    strategy, for good.

    Args:
        strategy: mirrored, on one worker or several.
        function: takes TensorFlow's own and its arguments: `replica_id`,
            `device`, `primary_var`, and those of `tf.Variable` by name.
            Returns an `initial_value`.
    """
    extended = strategy.extended
    own = extended._get_variable_creator_initial_value
    extended._get_variable_creator_initial_value = functools.partial(
        function, own
    )
