"""Stands in the way of a method of an object, for a while.

Several may stand in the way of one method, from several threads, and leave in
any order: the last one to leave puts back what was there.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

_LOCK = threading.Lock()
_NOTHING = object()


@contextlib.contextmanager
def gate(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Within it, `owner.name(...)` is `around(owner.name, ...)`.

    Of several, the one that came last is the outermost.

    Args:
        owner: what has the method: a layer, an optimizer, a module.
        name: of the method.
        around: gets the method, and what it was called with.
    """
    # Equal functions are still two: each leaves by itself.
    own = functools.partial(around)
    with _LOCK:
        standing = vars(owner).get(name)
        if not isinstance(standing, _Gate):
            before = vars(owner).get(name, _NOTHING)
            standing = _Gate(getattr(owner, name), before)
            # Past Keras's own __setattr__, which tracks what it is given.
            vars(owner)[name] = standing
        standing.arounds += (own,)
    try:
        yield
    finally:
        with _LOCK:
            standing.arounds = tuple(
                each for each in standing.arounds if each is not own
            )
            if not standing.arounds and vars(owner).get(name) is standing:
                if standing.before is _NOTHING:
                    del vars(owner)[name]
                else:
                    vars(owner)[name] = standing.before


class _Gate:
    """What is called in a method's place.

    Attributes:
        arounds: innermost first; replaced as a whole, since other threads may
            be on their way through.
        before: the object's own attribute that it took the place of.
    """

    def __init__(self, method: Callable[..., Any], before: Any):
        self._method = method
        self.before = before
        self.arounds: tuple[Callable[..., Any], ...] = ()
        functools.update_wrapper(self, method, updated=())

    def __call__(self, /, *args, **kwargs):
        call = self._method
        for around in self.arounds:
            call = functools.partial(around, call)
        return call(*args, **kwargs)
