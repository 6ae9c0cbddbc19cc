"""Where a thread is: in a call of a kept layer, or in none.

A region says in what the operations of the code that runs are computed. The
functions that ask for it stand in the place of Keras's and TensorFlow's while
at least one kept layer is called: see `autocast`.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping

import keras


@dataclasses.dataclass
class Seen:
    """What a call of a model showed.

    Attributes:
        operations: the names of those that float32 made a difference to, by
            the id of the innermost layer that they ran in.
        failed: the innermost layer that raised, or None.
        known: the ids of the model's layers; what code makes on the fly is
            noted of the layer around it. None where all are known.
        multiply: the ids of layers in which a product ran.
        take_data: by a layer's id, whether all its calls took numbers of the
            data, and nothing else; see `raw_data`.
        take_wide: by a layer's id, whether none of its calls took other floats
            than such numbers.
        round_data: the ids of layers whose rounding such numbers would not
            bear: they compute with them, or hand them on to what does.
    """

    operations: dict[int, set[str]] = dataclasses.field(default_factory=dict)
    failed: keras.layers.Layer | None = None
    known: frozenset[int] | None = None
    multiply: set[int] = dataclasses.field(default_factory=set)
    take_data: dict[int, bool] = dataclasses.field(default_factory=dict)
    take_wide: dict[int, bool] = dataclasses.field(default_factory=dict)
    round_data: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Region:
    """A call of a kept layer, or of a layer inside it.

    Attributes:
        layer: the layer.
        dtype: its compute dtype, one of 16 bits; None where its operations
            are left alone, while those of layers inside it may not be.
        kinds: what operations compute in, as `operations.resolve` returns it;
            None to leave alone all, and only look on.
        seen: where to note what is seen.
        is_float32: whether all of the layer is float32, but that its products
            take `dtype`.
        noted: the layer that what is seen is noted of; None for `layer`.
        is_step: whether it is no call, but a step that calls layers: they
            compute as they do outside of it.
    """

    layer: keras.layers.Layer
    dtype: str | None
    kinds: Mapping[str, str] | None
    seen: Seen | None = None
    is_float32: bool = False
    noted: keras.layers.Layer | None = None
    is_step: bool = False

    @property
    def noting(self) -> keras.layers.Layer:
        """The layer that what is seen is noted of."""
        return self.layer if self.noted is None else self.noted

    def note(self, name: str) -> None:
        if self.seen is not None:
            self.seen.operations.setdefault(id(self.noting), set()).add(name)

    def noted_of(self, inner: keras.layers.Layer) -> keras.layers.Layer:
        """What a layer that is called in here is noted of."""
        known = None if self.seen is None else self.seen.known
        if known is None or id(inner) in known:
            return inner
        return self.noting


class _State(threading.local):
    region: Region | None = None


_state = _State()


def current() -> Region | None:
    """The region that this thread is in."""
    return _state.region


def active() -> Region | None:
    """The region that this thread is in, if it changes operations."""
    region = _state.region
    return None if region is None or region.dtype is None else region


@contextlib.contextmanager
def within(region: Region | None) -> Iterator[None]:
    """Within it, this thread is in a region; None suspends the one it is in."""
    former = _state.region
    _state.region = region
    try:
        yield
    finally:
        _state.region = former
