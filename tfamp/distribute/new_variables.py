"""Variables that a step turns out to need while it is traced."""

import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def made_outside_of_graphs(make: Callable[[], _T]) -> _T:
    """Returns what `make` returns, which sees no graph being traced.

    `tf.init_scope` leaves the graph too, but a `tf.function` counts the
    variables made in it as its own, and then traces everything again: the
    largest part of the wait before the first step. What stands in the way of
    new variables is of its thread, so another thread is free of it.
    """
    made: list[_T] = []
    thread = threading.Thread(target=lambda: made.append(make()))
    thread.start()
    thread.join()
    return made[0]
