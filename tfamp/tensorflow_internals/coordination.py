"""What workers tell one another beside their collectives, and how those end.

TensorFlow starts a coordination service in every cluster, and uses it for
itself alone: it can be told how long to wait, it keeps texts, and it knows who
lives. Nothing public reaches it.
"""

from collections.abc import Mapping

import tensorflow as tf
from tensorflow.python.eager import context


def bound_joining(jobs: Mapping[str, int], seconds: int) -> None:
    """Lets TensorFlow wait for those that have come, and not for an hour.

    To be called before the strategy is made, which else configures the service
    in the same way, without a limit. Where somebody has configured it before,
    theirs stays.

    Args:
        jobs: how many tasks each has; the first task of the first one leads.
        seconds: how long.
    """
    if context.context().coordination_service is not None:
        return
    known = tf.compat.v1.ConfigProto().experimental.coordination_config
    for job, count in jobs.items():
        known.coordinated_job_list.add(name=job, num_tasks=count)
    context.context().configure_coordination_service(
        "standalone",
        service_leader=f"/job:{next(iter(jobs))}/replica:0/task:0",
        cluster_register_timeout_in_ms=seconds * 1000,
        coordinated_jobs=list(known.coordinated_job_list),
    )


def put_text(key: str, text: str) -> None:
    """Leaves a text for other workers under a key, which nobody has used."""
    context.context().set_config_key_value(key, text)


def text_under(key: str, milliseconds: int) -> str:
    """What a worker left under a key.

    Raises:
        tf.errors.DeadlineExceededError: nobody had, so long.
    """
    return context.context().get_config_key_value(key, milliseconds)


def check_worker(number: int, milliseconds: int) -> None:
    """Asks a worker whether it lives.

    Raises:
        tf.errors.OpError: it does not, or it is another one by now.
    """
    context.context().check_collective_ops_peer_health(
        f"/job:worker/replica:0/task:{number}", milliseconds
    )


def abort_collectives(code: int, message: str) -> None:
    """Ends whatever waits for other workers here, and all that would.

    Args:
        code: of `tf.errors`, what is raised there.
        message: what it says.
    """
    context.context().abort_collective_ops(code, message)
