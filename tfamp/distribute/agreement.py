"""Whether all workers were started alike: what each is to train, compared.

Through the coordination service, by texts: collectives would fail, or wait for
ever, where one worker does something else.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Mapping

import tensorflow as tf

# TensorFlow has no public way to its own store of keys and values.
from tensorflow.python.eager import context

from tfamp.distribute.consensus import number_of_workers
from tfamp.distribute.workers import lost
from tfamp.errors import InputError, WorkerLostError

# Short, so that signals are heard meanwhile.
_POLL_MILLISECONDS = 1000
# A host may be busy.
_HEALTH_MILLISECONDS = 20_000
_LAST_READER_SECONDS = 10.0
# For the answer to the last reader.
_END_SECONDS = 0.5

_exchanges = itertools.count()


def check_alike(
    strategy: tf.distribute.Strategy, facts: Mapping[str, str]
) -> None:
    """Compares facts by name; all workers must call it together.

    Args:
        strategy: of one worker, where nothing is asked, or of several.
        facts: a value that begins with "#" is a fingerprint, and not shown.

    Raises:
        InputError: on all workers, where they are not the same on all.
        WorkerLostError: where one has ended meanwhile.
    """
    count = number_of_workers(strategy)
    if count == 1:
        return
    own = strategy.cluster_resolver.task_id
    prefix = f"tfamp/{next(_exchanges)}"
    store = context.context()
    store.set_config_key_value(f"{prefix}/{own}", json.dumps(dict(facts)))
    of_workers = [
        json.loads(_waited_for(f"{prefix}/{worker}", worker))
        for worker in range(count)
    ]
    difference = describe(of_workers)
    if difference is None:
        return
    # The first worker keeps what they read, and so has to end last.
    with contextlib.suppress(tf.errors.OpError, WorkerLostError):
        if own != 0:
            store.set_config_key_value(f"{prefix}/{own}/read", "yes")
        else:
            for worker in range(1, count):
                key = f"{prefix}/{worker}/read"
                _waited_for(key, worker, _LAST_READER_SECONDS)
            time.sleep(_END_SECONDS)
    raise InputError(
        f"The workers differ: {difference}; start the same program with the "
        "same flags and data on each."
    )


def describe(of_workers: list[dict[str, str]]) -> str | None:
    """What differs, and on which worker; None where nothing does."""
    names = list(dict.fromkeys(name for each in of_workers for name in each))
    parts = []
    for name in names:
        values = [each.get(name, "missing") for each in of_workers]
        usual = max(values, key=values.count)
        odd = [i for i, value in enumerate(values) if value != usual]
        if not odd:
            continue
        where = ", ".join(map(str, odd))
        if usual.startswith("#"):
            others = [i for i in range(len(values)) if i not in odd]
            parts.append(
                f"{name} of worker {where} is not that of worker "
                f"{', '.join(map(str, others))}"
            )
        else:
            on_odd = ", ".join(f"{values[i]} on worker {i}" for i in odd)
            parts.append(f"{name} is {on_odd} and {usual} on the others")
    return "; ".join(parts) or None


def _waited_for(key: str, worker: int, seconds: float = float("inf")) -> str:
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
