"""Texts that workers leave for one another, in the coordination service."""

import time

import tensorflow as tf

# TensorFlow has no public way to its own store of keys and values.
from tensorflow.python.eager import context

from tfamp.distribute.workers import lost

# Short, so that signals are heard meanwhile.
_POLL_MILLISECONDS = 1000
# A host may be busy.
_HEALTH_MILLISECONDS = 20_000


def put(key: str, text: str) -> None:
    """Leaves a text under a key, which nobody has used before."""
    context.context().set_config_key_value(key, text)


def waited_for(key: str, worker: int, seconds: float = float("inf")) -> str:
    """What a worker wrote under a key, as soon as it has.

    Raises:
        WorkerLostError: it does not live.
    """
    begin = time.monotonic()
    store = context.context()
    while True:
        try:
            return store.get_config_key_value(key, _POLL_MILLISECONDS)
        except tf.errors.DeadlineExceededError:
            if time.monotonic() - begin > seconds:
                raise
        try:
            store.check_collective_ops_peer_health(
                f"/job:worker/replica:0/task:{worker}", _HEALTH_MILLISECONDS
            )
        except tf.errors.OpError:
            raise lost(f"worker {worker}") from None
