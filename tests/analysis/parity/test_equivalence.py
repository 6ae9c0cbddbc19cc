"""Two one-sided tests: against figures by hand, and by simulation."""

import math

import numpy as np
import pytest

from tfamp.analysis.parity.equivalence import (
    Equivalence,
    paired_equivalence,
    seeds_needed,
    sign_test,
    two_one_sided_tests,
)
from tfamp.errors import InputError

SIMULATIONS = 20000


def rejection_rate(pairs, true_mean, deviation, margin=1.0, alpha=0.05):
    """How often simulated differences are called equivalent."""
    rng = np.random.default_rng(pairs)
    differences = rng.normal(true_mean, deviation, [SIMULATIONS, pairs])
    return np.mean(two_one_sided_tests(differences, margin) < alpha)


def five_sampling_errors(rate):
    return 5 * math.sqrt(rate * (1 - rate) / SIMULATIONS)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("pairs", [2, 5, 20])
@pytest.mark.parametrize("edge", [-1.0, 1.0])
def test_false_positives_at_the_margin_are_as_many_as_alpha(pairs, alpha, edge):
    # A spread so small that the other one of the two tests always rejects.
    rate = rejection_rate(pairs, edge, deviation=0.01, alpha=alpha)
    assert rate == pytest.approx(alpha, abs=five_sampling_errors(alpha))


@pytest.mark.parametrize("true_mean", [1.0, 1.5, -3.0])
def test_false_positives_are_no_more_than_alpha_at_or_beyond_the_margin(
    true_mean,
):
    rate = rejection_rate(5, true_mean, deviation=0.7)
    assert rate <= 0.05 + five_sampling_errors(0.05)


def test_what_is_equal_is_found_equivalent_given_enough_pairs():
    assert rejection_rate(5, true_mean=0.0, deviation=0.3) > 0.99
    assert rejection_rate(3, true_mean=0.0, deviation=1.0) < 0.2


def test_p_value_and_interval_are_those_of_the_t_distribution():
    # Differences 1, 2, 3: mean 2, deviation 1, standard error 1 / sqrt(3).
    found = paired_equivalence([0, 0, 0], [1, 2, 3], margin=4, alpha=0.05)
    assert found.mean_difference == 2.0
    assert found.standard_deviation == 1.0
    # With 2 degrees of freedom P(T > t) = 1/2 - t / (2 sqrt(t**2 + 2)).
    t = (4 - 2) * math.sqrt(3)
    assert found.p_value == pytest.approx(0.5 - t / (2 * math.sqrt(t * t + 2)))
    # So t is exceeded with 5% where t / sqrt(t**2 + 2) = 0.9.
    half = math.sqrt(2 * 0.81 / 0.19) / math.sqrt(3)
    assert found.confidence_interval == pytest.approx((2 - half, 2 + half))
    assert found.method == "t-test"
    assert found.equivalent


@pytest.mark.parametrize("sign", [1, -1])
def test_equivalence_is_the_interval_within_the_margin(sign):
    other = [sign * d for d in (0.001, 0.002, 0.004)]
    found = paired_equivalence([0, 0, 0], other, margin=0.01)
    edge = max(map(abs, found.confidence_interval))
    for margin, expected in ((1.01 * edge, True), (0.99 * edge, False)):
        found = paired_equivalence([0, 0, 0], other, margin=margin)
        assert found.equivalent == expected


def test_one_pair_proves_nothing():
    found = paired_equivalence([0.9], [0.9], margin=0.01, identical=True)
    assert (found.equivalent, found.method) == (False, "none")
    assert found.p_value is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_result_that_is_no_number_is_not_equivalent(bad):
    found = paired_equivalence([0.9, 0.9], [0.9, bad], margin=0.01)
    assert (found.equivalent, found.method) == (False, "none")
    assert found.mean_difference is None


def test_identical_runs_are_equivalent():
    found = paired_equivalence([1, 2], [1, 2], margin=0.01, identical=True)
    assert (found.equivalent, found.method) == (True, "identical")


@pytest.mark.parametrize(
    ("pairs", "equivalent"), [(2, False), (4, False), (5, True)]
)
def test_differences_without_spread_take_a_sign_test(pairs, equivalent):
    # One of 360 images more each time; as float32 these differences differ.
    correct = np.array([7, 331, 253, 200, 97])[:pairs]
    reference = np.float32(correct / 360)
    other = np.float32((correct + 1) / 360)
    assert np.ptp(np.float64(other) - np.float64(reference)) > 0
    found = paired_equivalence(reference.tolist(), other.tolist(), margin=0.01)
    assert found.method == "sign test"
    assert found.p_value == 0.5**pairs
    assert found.equivalent == equivalent


def test_differences_without_spread_at_the_margin_are_not_equivalent():
    assert sign_test(np.full(9, 0.01), margin=0.01) == 1.0
    assert sign_test(np.full(9, -0.02), margin=0.01) == 1.0


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan, math.inf])
def test_a_margin_that_is_none_is_refused(margin):
    with pytest.raises(InputError, match="margin="):
        paired_equivalence([0, 0], [1, 2], margin=margin)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, math.nan])
def test_an_alpha_that_is_none_is_refused(alpha):
    with pytest.raises(InputError, match="alpha="):
        paired_equivalence([0, 0], [1, 2], margin=1.0, alpha=alpha)


@pytest.mark.parametrize("mean", [0.0, 0.3, -0.6])
def test_so_many_seeds_like_these_show_it_and_one_less_does_not(mean):
    found = Equivalence(False, "t-test", 3, mean, 1.0, 0.5, (-9.0, 9.0))

    needed = seeds_needed(found, margin=1.0)

    def p_value(pairs):
        values = np.random.default_rng(0).normal(size=pairs)
        values = (values - values.mean()) / values.std(ddof=1) + mean
        return two_one_sided_tests(values, 1.0)

    assert p_value(needed) < 0.05 <= p_value(needed - 1)


def test_no_number_of_seeds_shows_a_difference_of_the_margin_to_be_none():
    found = Equivalence(False, "t-test", 3, 1.0, 0.1, 0.5, (-9.0, 9.0))
    assert seeds_needed(found, margin=1.0) is None
    found = Equivalence(False, "t-test", 3, 0.9, 5.0, 0.5, (-9.0, 9.0))
    assert seeds_needed(found, margin=1.0) is None


def test_equal_differences_take_five_seeds_for_the_sign_test():
    found = paired_equivalence([1.0, 2.0], [1.5, 2.5], margin=1.0)
    assert (found.method, found.equivalent) == ("sign test", False)
    assert seeds_needed(found, margin=1.0) == 5  # 1 / 32 < 0.05
