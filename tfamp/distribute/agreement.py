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

from tfamp.distribute.consensus import number_of_workers
from tfamp.distribute.texts import put, waited_for
from tfamp.errors import InputError, WorkerLostError

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
    put(f"{prefix}/{own}", json.dumps(dict(facts)))
    of_workers = [
        json.loads(waited_for(f"{prefix}/{worker}", worker))
        for worker in range(count)
    ]
    difference = describe(of_workers)
    if difference is None:
        return
    # The first worker keeps what they read, and so has to end last.
    with contextlib.suppress(tf.errors.OpError, WorkerLostError):
        if own != 0:
            put(f"{prefix}/{own}/read", "yes")
        else:
            for worker in range(1, count):
                key = f"{prefix}/{worker}/read"
                waited_for(key, worker, _LAST_READER_SECONDS)
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
