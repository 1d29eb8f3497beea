"""Intervals hold what they should as often as they should, and differences are those of pairs."""

import numpy as np
import pytest

from recurrent_bart.evaluation.bootstrap import interval, resampled_means


def test_the_mean_weighs_documents_by_their_counts_and_seeds_alike():
    totals = np.array([[2.0, 30.0, 0.0], [4.0, 60.0, 0.0]])
    counts = np.array([[1.0, 9.0, 0.0], [1.0, 9.0, 0.0]])
    assert interval(resampled_means(totals, counts)).mean == pytest.approx((3.2 + 6.4) / 2)


def test_documents_with_nothing_to_count_are_not_drawn():
    """Else a draw of them alone would have no mean."""
    found = interval(resampled_means(np.array([[3.0, 0.0, 0.0]]), np.array([[2.0, 0.0, 0.0]])))
    assert (found.low, found.mean, found.high) == (1.5, 1.5, 1.5)


def test_19_of_20_intervals_hold_the_truth():
    random, n_held = np.random.default_rng(1), 0
    for _ in range(200):
        values = random.exponential(size=(1, 60))
        found = interval(resampled_means(values, np.ones_like(values)))
        n_held += found.low <= 1.0 <= found.high
    assert 176 <= n_held <= 198


def test_the_difference_of_a_pair_is_surer_than_either():
    hard = np.random.default_rng(2).normal(5.0, 2.0, size=(1, 40))
    ones = np.ones_like(hard)
    one, other = resampled_means(hard, ones), resampled_means(hard + 0.1, ones)
    assert interval(one).high - interval(one).low > 0.5
    difference = interval(other - one)
    assert (difference.low, difference.mean, difference.high) == pytest.approx((0.1, 0.1, 0.1))


def test_seeds_that_differ_widen_the_interval():
    """On documents that are all alike the seeds alone make it."""
    ones = np.ones((3, 50))
    found = interval(resampled_means(ones * [[1.0], [2.0], [3.0]], ones))
    assert found.mean == pytest.approx(2.0)
    assert found.low < 1.5 < 2.5 < found.high
