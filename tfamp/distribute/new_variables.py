"""Variables that a step turns out to need while it is traced."""

from collections.abc import Callable
from concurrent import futures
from typing import TypeVar

_T = TypeVar("_T")


def made_outside_of_graphs(make: Callable[[], _T]) -> _T:
    """Returns what `make` returns, which sees no graph being traced.

    `tf.init_scope` leaves the graph too, but a `tf.function` counts the
    variables made in it as its own, and then traces everything again: the
    largest part of the wait before the first step. What stands in the way of
    new variables is of its thread, so another thread is free of it.
    """
    with futures.ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()
