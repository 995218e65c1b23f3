"""Baselines meet the same exact totals; scores become costs; the running minimum keeps what is forbidden."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq.alloc.baselines import costs_from_scores, random_mix, running_min, uniform
from mopeq.alloc.reach import largest_total
from mopeq.errors import BadInput


def weigh(weight_IF, choice_I):
    return int(weight_IF[np.arange(len(choice_I)), choice_I].sum())


def test_random_mix_is_the_lower_width_and_upgrades():
    weight_IF = np.tile([20, 30, 40], (600, 1))
    choice_I = random_mix(weight_IF, 600 * 20 + 2500, seed=0)
    assert np.bincount(choice_I, minlength=3).tolist() == [350, 250, 0]
    assert (random_mix(weight_IF, 600 * 20 + 2500, seed=0) == choice_I).all()
    assert (random_mix(weight_IF, 600 * 20 + 2500, seed=1) != choice_I).any()
    above = random_mix(weight_IF, 600 * 30 + 10, seed=0)
    assert np.bincount(above, minlength=3).tolist() == [0, 599, 1]
    assert (random_mix(weight_IF, 600 * 40, seed=0) == 2).all()
    assert (random_mix(weight_IF, 600 * 20, seed=0) == 0).all()


def test_random_mix_is_even_over_items_and_shapes():
    """Each item is upgraded about as often as the budget says, whatever its size."""
    weight_IF = np.array([[2, 3, 4], [6, 9, 12]])[np.arange(40) % 2]
    upgraded_I = sum((random_mix(weight_IF, 80 + 80 + 40, seed) == 1).astype(float) for seed in range(400)) / 400
    assert upgraded_I.mean() == pytest.approx(0.5, abs=0.03)
    assert upgraded_I[::2].mean() == pytest.approx(upgraded_I[1::2].mean(), abs=0.05)
    assert upgraded_I.min() > 0.35 and upgraded_I.max() < 0.65


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 5), st.sampled_from([3, 12, 200]))
def test_random_mix_meets_any_reachable_total(seed, items, formats, high):
    rng = np.random.default_rng(seed)
    weight_IF = np.sort(rng.integers(1, high, (items, formats)), axis=1)[rng.integers(0, 2, items) % items]
    total = largest_total(weight_IF, int(rng.integers(weight_IF.min(1).sum(), weight_IF.max(1).sum() + 1)))
    assert weigh(weight_IF, random_mix(weight_IF, total, seed % 1000)) == total


def test_random_mix_lets_in_few_others_where_two_formats_cannot():
    weight_IF = np.tile([274, 292, 403, 422, 532, 552], (2000, 1))
    total = largest_total(weight_IF, 2000 * 330 + 1)
    choice_I = random_mix(weight_IF, total, seed=0)
    assert weigh(weight_IF, choice_I) == total
    assert np.isin(choice_I, [1, 2]).sum() >= 1970


def test_uniform():
    assert uniform(3, 1).tolist() == [1, 1, 1]


def test_scores_become_costs_a_quarter_a_bit():
    cost_IF = costs_from_scores(np.array([1.0, 64.0, -16.0]), [2, 3, 4])
    assert cost_IF.tolist() == [[1 / 16, 1 / 64, 1 / 256], [4, 1, 0.25], [-1, -0.25, -0.0625]]


def test_running_minimum():
    cost_IF = np.array([[3.0, 4.0, -1.0], [1.0, np.inf, 0.5], [np.inf, 2.0, 3.0], [-1.0, 5.0, 2.0]])
    want = [[3, 3, 0], [1, np.inf, 0.5], [np.inf, 2, 2], [0, 0, 0]]
    assert running_min(cost_IF).tolist() == want
    with pytest.raises(BadInput, match="item 1"):
        running_min(np.array([[1.0, 2.0], [np.nan, 1.0]]))
