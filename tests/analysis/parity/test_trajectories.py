"""The first step at which two runs part, on losses that one can read."""

import math

import pytest

from tfamp.analysis.parity.trajectories import compare, epsilon_of, thin


def test_epsilon_is_the_spacing_of_the_compute_format():
    assert epsilon_of("mixed_bfloat16") == 2.0**-7
    assert epsilon_of("mixed_float16") == 2.0**-10
    assert epsilon_of("float32") == 2.0**-23


def test_runs_part_at_the_first_step_beyond_epsilon():
    reference = {1: 4.0, 2: 4.0, 3: 4.0, 4: 4.0}
    # Relative to the larger: 1/16 exactly, then a little more.
    other = {1: 4.0, 2: 3.75, 3: 3.74, 4: 0.0}
    found = compare(reference, other, epsilon=1 / 16)
    assert found.first_step == 3
    assert found.at_first_step == 0.0
    assert found.relative_differences[1] == 1 / 16
    # The larger of the two is the measure, whichever it is.
    assert compare(other, reference, epsilon=1 / 16).first_step == 3


def test_runs_that_agree_never_part():
    losses = {1: 0.5, 2: 0.0, 3: None}
    found = compare(losses, losses, epsilon=2.0**-23)
    assert found.first_step is None


def test_a_loss_that_is_not_finite_in_one_run_parts_them():
    reference = {1: 1.0, 2: 1.0}
    found = compare(reference, {1: 1.0, 2: None}, epsilon=0.5)
    assert found.first_step == 2
    assert math.isnan(found.relative_differences[1])


def test_runs_without_a_common_step_say_nothing():
    found = compare({1: 1.0}, {2: 1.0}, epsilon=0.5)
    assert (found.first_step, found.at_first_step) == (None, None)
    assert compare({}, {}, epsilon=0.5).first_step is None


def test_a_first_step_that_is_a_mean_of_steps_is_no_first_step():
    assert compare({40: 1.0}, {40: 1.1}, epsilon=0.5).at_first_step is None


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (2, ([3, 5], [2.0, 5.0])),
        (9, ([1, 2, 3, 4, 5], [1.0, 2.0, 3.0, None, 5.0])),
    ],
)
def test_thinning_takes_the_means_of_stretches(most, expected):
    assert thin(range(1, 6), [1.0, 2.0, 3.0, None, 5.0], most) == expected


def test_thinning_nothing_gives_nothing():
    assert thin([], [], 10) == ([], [])
