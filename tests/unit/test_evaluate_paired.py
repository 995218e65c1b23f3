"""The paired bootstrap against what is known of a mean, and its promises."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mopeq.evaluate.paired import mean_of


def test_the_interval_of_many_items_is_the_normal_one() -> None:
    rng = np.random.default_rng(0)
    value = rng.normal(0.3, 2.0, 800)
    found = mean_of(value)
    assert found
    half = 1.96 * value.std(ddof=1) / math.sqrt(len(value))
    assert found["mean"] == pytest.approx(value.mean(), abs=1e-12)
    assert found["ci95"] == pytest.approx([value.mean() - half, value.mean() + half], abs=0.06 * half)
    assert found["n"] == 800


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    """200 samples of 60 skewed differences whose mean is 1: between 88 % and 99 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        found = mean_of(rng.exponential(1.0, 60))
        assert found
        held += found["ci95"][0] <= 1 <= found["ci95"][1]
    assert 176 <= held <= 198


def test_pairing_takes_out_what_the_items_share() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 5, 200)  # items differ far more than the two models do
    a, b = hard + rng.normal(0.2, 0.1, 200), hard + rng.normal(0, 0.1, 200)
    paired, alone = mean_of(a - b), mean_of(a)
    assert paired and alone
    assert paired["ci95"][0] > 0.1
    assert paired["ci95"][1] - paired["ci95"][0] < 0.05 * (alone["ci95"][1] - alone["ci95"][0])


def test_weights_make_a_ratio_of_sums() -> None:
    value, weight = np.array([3.0, 8.0, 0.5]), np.array([1, 4, 0])
    found = mean_of(value, weight)
    assert found
    assert found["mean"] == pytest.approx(11 / 5)
    assert found["n"] == 2  # what weighs nothing is no item
    assert found["ci95"] == pytest.approx([2.0, 3.0])


def test_little_is_said_of_little() -> None:
    assert mean_of([]) is None
    assert mean_of([1.0], [0]) is None
    assert mean_of([0.5]) == {"mean": 0.5, "ci95": None, "n": 1}
    assert mean_of([0.0] * 40) == {"mean": 0.0, "ci95": None, "n": 40}  # an interval of no width would be a lie
    assert mean_of([2.0, 4.0], [1, 2]) == {"mean": 2.0, "ci95": None, "n": 2}


def test_the_same_seed_gives_the_same_interval_and_large_counts_fit() -> None:
    value = np.random.default_rng(3).normal(size=5000)
    assert mean_of(value, seed=1) == mean_of(value, seed=1) != mean_of(value, seed=2)
