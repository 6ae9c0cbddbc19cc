"""What differs between workers is told with the worker."""

from tfamp.distribute.agreement import describe


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
