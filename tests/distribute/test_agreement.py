"""What differs between workers is told with the worker."""

import pytest
import tensorflow as tf

import tfamp
from tfamp.distribute.agreement import describe
from tfamp.distribute.workers import worker_errors


def test_nothing_is_said_of_workers_that_are_alike():
    assert describe([{"a": "1", "b": "#x"}] * 3) is None


def test_the_odd_one_and_its_value_are_named():
    workers = [{"precision": name} for name in ("float32", "half", "float32")]
    assert describe(workers) == (
        "precision is half on worker 1 and float32 on the others"
    )


def test_of_two_the_first_counts_as_the_usual():
    workers = [{"rate": "0.1"}, {"rate": "0.2"}]
    assert describe(workers) == "rate is 0.2 on worker 1 and 0.1 on the others"


def test_fingerprints_are_not_shown():
    workers = [{"model": "#1"}, {"model": "#1"}, {"model": "#2"}]
    assert describe(workers) == ("model of worker 2 is not that of worker 0, 1")


def test_each_difference_is_told_and_what_one_lacks():
    assert describe([{"a": "1", "b": "2"}, {"a": "2"}]) == (
        "a is 2 on worker 1 and 1 on the others; "
        "b is missing on worker 1 and 2 on the others"
    )


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (
            "Collective ops is aborted by: Error reported from "
            "/job:worker/task:0: The following tasks are unhealthy (stopped "
            "sending heartbeats):\n/job:worker/replica:0/task:1\nThe tasks "
            "have crashed.",
            "worker 1",
        ),
        (
            "unhealthy (stopped sending heartbeats):\n"
            "/job:worker/replica:0/task:1\n/job:worker/replica:0/task:2\nThe",
            "worker 1 and worker 2",
        ),
        (
            "Error reported from /job:worker/task:2: Socket closed\nAdditional "
            "GRPC error information from remote target "
            "/job:worker/replica:0/task:0 while calling x",
            "worker 0",
        ),
        ("/job:worker/replica:0/task:3 was restarted", "worker 3"),
        ("Socket closed", "Another worker"),
    ],
)
def test_a_survivor_names_the_lost_one_only(message, names):
    error = tf.errors.UnavailableError(
        None, None, f"{message} CoordinationService"
    )
    with (
        pytest.raises(tfamp.WorkerLostError, match=f"^{names} stopped"),
        worker_errors(),
    ):
        raise error
