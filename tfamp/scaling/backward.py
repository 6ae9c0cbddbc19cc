"""Which scale the gradients have that are being computed.

What looks at gradients on their way back, as 8-bit products do, must know the
true ones.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Replicas are traced in threads of their own.
_local = threading.local()


@contextlib.contextmanager
def gradients_scaled_by(optimizer: Any) -> Iterator[None]:
    """Within it, gradients that are computed are of that optimizer's loss."""
    before = current_scale()
    _local.scale = getattr(optimizer, "applied_scale", None)
    try:
        yield
    finally:
        _local.scale = before


def current_scale() -> tf.Tensor | None:
    """The scale of the loss, a float32 scalar; None where it is 1."""
    return getattr(_local, "scale", None)
