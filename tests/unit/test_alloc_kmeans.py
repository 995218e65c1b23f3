"""1-D k-means: the optimum of all partitions, the highest mean to the widest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq.alloc.kmeans import cluster
from mopeq.errors import BadInput


def spread(values, labels):
    return sum(((values[labels == c] - values[labels == c].mean()) ** 2).sum() for c in np.unique(labels))


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 4), st.sampled_from(["normal", "few", "heavy"]))
def test_equals_the_best_of_all_partitions(seed, items, clusters, kind):
    rng = np.random.default_rng(seed)
    score_I = {
        "normal": rng.normal(size=items),
        "few": rng.integers(0, 4, items) * 1.0,
        "heavy": np.exp(3 * rng.normal(size=items)),
    }[kind]
    choice_I = cluster(score_I, list(range(2, 2 + clusters)))
    best = min(spread(score_I, np.array(labels)) for labels in itertools.product(range(clusters), repeat=items))
    assert spread(score_I, choice_I) == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert choice_I.dtype == np.int64 and choice_I.min() == 0
    assert len(np.unique(choice_I)) == min(clusters, len(np.unique(score_I)))
    order = np.argsort(score_I, kind="stable")
    assert (np.diff(choice_I[order]) >= 0).all()  # intervals, the highest scores in the widest
    for value in np.unique(score_I):
        assert len(np.unique(choice_I[score_I == value])) == 1


@pytest.mark.parametrize("items", [50, 400])
def test_equals_the_quadratic_recurrence(items):
    """The recurrence without halving, squared deviations computed outright."""
    values = np.sort(np.exp(np.random.default_rng(items).normal(size=items)))
    loss = np.full((items + 1, items + 1), np.inf)
    for i in range(items):
        n = np.arange(1, items - i + 1)
        total, squares = np.cumsum(values[i:]), np.cumsum(values[i:] ** 2)
        loss[i, i + 1 :] = squares - total**2 / n
    best = loss[0]
    for _ in range(3):
        best = np.array([np.inf] + [(best[:j] + loss[:j, j]).min() for j in range(1, items + 1)])
    assert spread(values, cluster(values, [2, 3, 4, 8])) == pytest.approx(best[-1], rel=1e-9)


def test_scale_and_place_do_not_matter():
    values = np.random.default_rng(0).normal(size=300)
    choice_I = cluster(values, [2, 3, 4])
    assert (cluster(values * 2.0**900, [2, 3, 4]) == choice_I).all()
    assert (cluster(values * 2.0**-900, [2, 3, 4]) == choice_I).all()
    assert (cluster(values + 64.0, [2, 3, 4]) == choice_I).all()
    assert (cluster(values, [2, 3, 4], seed=7) == choice_I).all()
    assert (cluster(-values, [2, 3, 4]) == 2 - choice_I).all()


def test_fewer_scores_than_widths_use_the_narrowest():
    assert cluster(np.array([5.0, 5.0, 5.0]), [2, 3, 4]).tolist() == [0, 0, 0]
    assert cluster(np.array([5.0, 1.0, 5.0]), [2, 3, 4]).tolist() == [1, 0, 1]
    assert cluster(np.zeros(0), [2, 3]).tolist() == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(bad):
    with pytest.raises(BadInput, match="item 1 is not a finite number"):
        cluster(np.array([1.0, bad, 2.0]), [2, 3])
