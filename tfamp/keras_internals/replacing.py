"""Methods and functions of others, replaced for a while and put back."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def methods_replaced(instance: Any, **methods: Callable) -> Iterator[None]:
    """Within it, an instance has other methods."""
    # A method that a user set on the instance is put back.
    own = {
        name: vars(instance)[name] for name in methods.keys() & vars(instance)
    }
    for name, method in methods.items():
        object.__setattr__(instance, name, method)
    try:
        yield
    finally:
        for name in methods:
            if name in own:
                object.__setattr__(instance, name, own[name])
            else:
                object.__delattr__(instance, name)


def own_function(function: Callable) -> Callable:
    """What a function is when no thread replaces it."""
    return getattr(function, "tfamp_stands_for", function)


class _OfThreads:
    """A function that threads may each replace for themselves.

    Of a module or a class. Other threads are given its own meanwhile, and
    where no thread has another one any more it is as it was.
    """

    def __init__(self, owner: Any, name: str):
        self._owner, self._name = owner, name
        self._lock = threading.Lock()
        self._uses = 0
        self._thread = threading.local()
        self._own = vars(owner)[name]

        @functools.wraps(self._own)
        def called(*args, **kwargs):
            replacements = vars(self._thread).get("replacements")
            function = replacements[-1] if replacements else self._own
            return function(*args, **kwargs)

        self._called = called
        # For those who look for what stands behind a function.
        called.tfamp_stands_for = self._own  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def replaced(self, function: Callable) -> Iterator[Callable]:
        """Within it this thread calls `function`; yields the owner's own."""
        replacements = vars(self._thread).setdefault("replacements", [])
        with self._lock:
            if self._uses == 0:
                self._own = vars(self._owner)[self._name]
                setattr(self._owner, self._name, self._called)
            self._uses += 1
        replacements.append(function)
        try:
            yield self._own
        finally:
            # Not always the last: generators may end in any order.
            replacements.remove(function)
            with self._lock:
                self._uses -= 1
                is_ours = vars(self._owner)[self._name] is self._called
                if self._uses == 0 and is_ours:
                    setattr(self._owner, self._name, self._own)


@functools.cache
def of_threads(owner: Any, name: str) -> _OfThreads:
    """A function of a module or a class, for threads to replace."""
    return _OfThreads(owner, name)
