"""Texts that workers leave for one another, in the coordination service."""

import time

import tensorflow as tf

from tfamp import tensorflow_internals
from tfamp.distribute.workers import lost

# Short, so that signals are heard meanwhile.
_POLL_MILLISECONDS = 1000
# A host may be busy.
_HEALTH_MILLISECONDS = 20_000


def put(key: str, text: str) -> None:
    """Leaves a text under a key, which nobody has used before."""
    tensorflow_internals.put_text(key, text)


def waited_for(key: str, worker: int, seconds: float = float("inf")) -> str:
    """What a worker wrote under a key, as soon as it has.

    Raises:
        WorkerLostError: it does not live.
    """
    begin = time.monotonic()
    while True:
        try:
            return tensorflow_internals.text_under(key, _POLL_MILLISECONDS)
        except tf.errors.DeadlineExceededError:
            if time.monotonic() - begin > seconds:
                raise
        try:
            tensorflow_internals.check_worker(worker, _HEALTH_MILLISECONDS)
        except tf.errors.OpError:
            raise lost(f"worker {worker}") from None
