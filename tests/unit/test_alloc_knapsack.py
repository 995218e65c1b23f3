"""The exact allocator: equal to brute force on small cases, to HiGHS on larger ones, and honest when it stops early."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_matrix, vstack

from mopeq.alloc import core, knapsack, split
from mopeq.alloc.knapsack import solve, solve_code
from mopeq.alloc.reach import largest_total
from mopeq.errors import BadInput


def brute(cost_IF, weight_IF, total, bytes_IF):
    """The least (bytes, cost) of all choices of that total; None if there is none."""
    best = None
    rows = range(len(cost_IF))
    for choice in itertools.product(range(cost_IF.shape[1]), repeat=len(cost_IF)):
        if sum(int(weight_IF[i, f]) for i, f in zip(rows, choice, strict=True)) == total:
            cost = math.fsum(cost_IF[i, f] for i, f in zip(rows, choice, strict=True))
            key = sum(int(bytes_IF[i, f]) for i, f in zip(rows, choice, strict=True)), cost
            if cost < math.inf and (best is None or key < best):
                best = key
    return best


def answer(cost_IF, weight_IF, total, bytes_IF):
    if bytes_IF is None:
        return solve(cost_IF, weight_IF, total)
    return solve_code(cost_IF, weight_IF, bytes_IF, total)


def check_against_brute(cost_IF, weight_IF, total, bytes_IF=None):
    extra_IF = np.zeros_like(weight_IF) if bytes_IF is None else bytes_IF
    want = brute(cost_IF, weight_IF, total, extra_IF)
    if want is None:
        with pytest.raises(BadInput):
            answer(cost_IF, weight_IF, total, bytes_IF)
        return
    found = answer(cost_IF, weight_IF, total, bytes_IF)
    rows = np.arange(len(cost_IF))
    assert weight_IF[rows, found.choice_I].sum() == total
    assert extra_IF[rows, found.choice_I].sum() == want[0]
    assert found.cost == pytest.approx(want[1], rel=1e-12, abs=1e-12)
    assert found.cost == math.fsum(cost_IF[rows, found.choice_I])
    assert found.gap == 0.0


@st.composite
def problems(draw):
    """Odd weights, few or many classes, costs real or tied, some formats forbidden; a total mostly reachable."""
    items, formats = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    high = draw(st.sampled_from([2, 3, 5, 30, 1000]))
    weight_IF = rng.integers(0, high, (items, formats))
    if draw(st.booleans()):
        weight_IF = weight_IF[rng.integers(0, 2, items) % items]
    if draw(st.booleans()):
        weight_IF = np.sort(weight_IF, axis=1)
    kinds = [rng.random((items, formats)), rng.integers(-3, 3, (items, formats)) * 1.0, np.zeros((items, formats))]
    kinds.append(np.exp(3 * rng.normal(size=(items, 1))) * 4.0 ** -np.arange(formats))
    cost_IF = kinds[draw(st.integers(0, 3))]
    if draw(st.booleans()):
        cost_IF = np.where(rng.random((items, formats)) < 0.2, np.inf, cost_IF)
    total = int(weight_IF[np.arange(items), rng.integers(0, formats, items)].sum()) + draw(
        st.sampled_from([0, 0, 0, 1])
    )
    return cost_IF, weight_IF, total, rng.integers(0, high, (items, formats))


@settings(max_examples=400, deadline=None)
@given(problems())
def test_one_level_equals_brute_force(problem):
    cost_IF, weight_IF, total, _ = problem
    check_against_brute(cost_IF, weight_IF, total)


@settings(max_examples=400, deadline=None)
@given(problems())
def test_two_levels_equal_brute_force(problem):
    check_against_brute(*problem)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_sharing_among_steps_equals_brute_force(problem):
    """The path for odd shapes, forced by leaving no work to the common one."""
    cost_IF, weight_IF, total, _ = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "FIRST_TRY", -1)
        check_against_brute(cost_IF, weight_IF, total)


def test_too_many_shares_to_list_are_no_reason_to_give_up(monkeypatch):
    """Seven items of nearly random weights, first tried by shares: these are too many, the other search is not."""
    weight_IF = np.array(
        [
            [236, 198, 42],
            [100, 919, 816],
            [202, 979, 526],
            [200, 348, 974],
            [953, 118, 879],
            [25, 48, 60],
            [285, 234, 855],
        ]
    )
    cost_IF = np.random.default_rng(0).random((7, 3))
    monkeypatch.setattr(knapsack, "FIRST_TRY", -1)
    monkeypatch.setattr(split, "MOST_SHARINGS", 1000)
    check_against_brute(cost_IF, weight_IF, 2689)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60), st.sampled_from([(1, 5), (3, 4), (6, 10, 15)]))
def test_sharing_where_bounds_are_loose(seed, items, steps):
    """Costs far from convex, so that the sharing of the lowest bound is often not the best."""
    rng = np.random.default_rng(seed)
    step_I = np.array(steps)[rng.integers(0, len(steps), items)]
    weight_IF = step_I[:, None] * np.array([0, 1, 3, 4])
    cost_IF = rng.random((items, 4))
    total = int(weight_IF[np.arange(items), rng.integers(0, 4, items)].sum())
    want = solve(cost_IF, weight_IF, total)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "FIRST_TRY", -1)
        found = solve(cost_IF, weight_IF, total)
    assert weight_IF[np.arange(items), found.choice_I].sum() == total
    assert want.gap == found.gap == 0.0
    assert found.cost == pytest.approx(want.cost, rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_without_the_table_of_ways_the_answer_is_the_same(problem):
    """Large changes leave the shortest-path table empty; the search alone must do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mopeq.alloc.ways.MOST_CELLS", 0)
        check_against_brute(*problem)


# -------------------------------------------------------------------------------------- larger, against HiGHS


def highs(cost_IF, weight_IF, total):
    items, formats = cost_IF.shape
    one = LinearConstraint(block_diag([np.ones((1, formats))] * items), 1, 1)
    spend = LinearConstraint(csr_matrix(weight_IF.reshape(1, -1).astype(float)), total, total)
    result = milp(
        cost_IF.ravel(),
        constraints=[one, spend],
        integrality=np.ones(cost_IF.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": 60},
    )
    assert result.status == 0, result.message
    assert vstack([one.A, spend.A]).shape == (items + 1, cost_IF.size)
    return result.fun, result.x.reshape(items, formats).argmax(1)


def costs(items, levels, noise, seed):
    rng = np.random.default_rng(seed)
    levels = np.asarray(levels, dtype=float)
    return np.exp(rng.normal(size=(items, 1))) * 4.0**-levels * np.exp(noise * rng.normal(size=(items, len(levels))))


@pytest.mark.parametrize(
    ("name", "rows", "levels", "items"),
    [
        ("one shape", [[2, 3, 4]], [2, 3, 4], 2000),
        ("two shapes", [[2, 3, 4], [6, 9, 12]], [2, 3, 4], 900),
        ("widths apart", [[2, 4, 8], [3, 6, 12]], [2, 4, 8], 900),
        ("two group sizes", [[274, 292, 403, 422, 532, 552]], [2.1, 2, 3.1, 3, 4.1, 4], 60),
        ("steps nearly equal", [[0, 67, 134], [0, 68, 136]], [2, 3, 4], 400),
    ],
)
@pytest.mark.parametrize("share", [0.15, 0.6])
def test_cost_equals_highs(name, rows, levels, items, share):
    weight_IF = np.array(rows)[np.arange(items) % len(rows)]
    cost_IF = costs(items, levels, 0.6, seed=items)
    limit = int((1 - share) * weight_IF.min(1).sum() + share * weight_IF.max(1).sum())
    total = largest_total(weight_IF, limit)
    found = solve(cost_IF, weight_IF, total)
    want, choice_I = highs(cost_IF, weight_IF, total)
    assert weight_IF[np.arange(items), choice_I].sum() == total
    assert found.gap == 0.0
    assert found.cost == pytest.approx(want, rel=1e-9)
    assert found.cost <= want * (1 + 1e-12)


def test_steps_nearly_equal_are_shared_exactly():
    """2967 and 2968 units a bit: the total dictates the shares. Checked by enumerating all shares of convex costs."""
    items = 1500
    steps = np.where(np.arange(items) % 3 == 2, 2968, 2967)
    weight_IF = steps[:, None] * np.array([0, 1, 2])
    cost_IF = costs(items, [2, 3, 4], 0.0, seed=5)  # convex: the best k steps are the k largest savings
    total = largest_total(weight_IF, int(weight_IF[:, 1].sum()) - 12345)
    best = math.inf
    curves = {}
    for step in (2967, 2968):
        mine = cost_IF[steps == step]
        savings = np.sort(-np.diff(mine, axis=1).ravel())[::-1]
        curves[step] = mine[:, 0].sum() - np.append(0, np.cumsum(savings))
    for k, cost in enumerate(curves[2968]):
        rest, odd = divmod(total - 2968 * k, 2967)
        if not odd and 0 <= rest < len(curves[2967]):
            best = min(best, cost + curves[2967][rest])
    found = solve(cost_IF, weight_IF, total)
    assert found.gap == 0.0
    assert found.cost == pytest.approx(best, rel=1e-12)
    assert weight_IF[np.arange(items), found.choice_I].sum() == total


def test_shares_as_hard_to_spend_as_the_whole_are_not_tried(monkeypatch):
    """[130, 136] and [136, 130] at 1, 3 and 8 bits, groups of 32 and 128: a sharing would take seconds, thousands
    would be tried."""
    gate, down = [3595, 2764, 8175, 7248, 19630, 18460], [3757, 2890, 8279, 7310, 19720, 18496]
    weight_IF = np.array([gate] * 24 + [down] * 12)
    cost_IF = costs(36, [1, 1, 3, 3, 8, 8], 0.3, seed=0)
    monkeypatch.setattr(knapsack, "cheapest_split", too_wide)
    with monkeypatch.context() as patch:
        patch.setattr(core, "WORK_LIMIT", 100_000)
        found = solve(cost_IF, weight_IF, 474_879, 830)
    assert 474_879 - 830 <= weight_IF[np.arange(36), found.choice_I].sum() <= 474_879
    tried = []
    monkeypatch.setattr(knapsack, "cheapest", lambda *asked: tried.append(asked) or (found.choice_I, 0.0))
    total = int(weight_IF[np.arange(36), found.choice_I].sum())
    assert solve(cost_IF, weight_IF, total).cost == pytest.approx(found.cost)
    assert [len(asked) for asked in tried] == [3]  # all together, once, with all the work allowed


@pytest.mark.parametrize("kind", ["zero", "equal", "few values", "falling faster and faster"])
def test_ties_do_not_make_it_slow_or_wrong(kind):
    items, offsets = 5000, np.array([274, 292, 403, 422, 532, 552])
    rng = np.random.default_rng(0)
    cost_IF = {
        "zero": np.zeros((items, 6)),
        "equal": np.tile(4.0 ** -np.array([2, 2, 3, 3, 4, 4]), (items, 1)),
        "few values": rng.poisson(3, (items, 1)) * 4.0 ** -np.array([2, 2, 3, 3, 4, 4]),
        "falling faster and faster": np.tile(-1.0 * np.arange(6) ** 2, (items, 1)),
    }[kind]
    weight_IF = np.tile(offsets, (items, 1))
    total = largest_total(weight_IF, int(0.4 * weight_IF.max(1).sum() + 0.6 * weight_IF.min(1).sum()))
    found = solve(cost_IF, weight_IF, total)
    assert weight_IF[np.arange(items), found.choice_I].sum() == total
    assert found.gap == 0.0


# ------------------------------------------------------------------------------------------- gaps and refusals


@pytest.mark.parametrize("seed", [0, 1, 6])
def test_a_gap_is_a_bound(monkeypatch, seed):
    """Stopped at once, the cost exceeds the optimum by no more than the gap."""
    rng = np.random.default_rng(seed)
    weight_IF = np.tile([0, 18, 129, 148, 258, 278], (2000, 1))
    cost_IF = rng.random((2000, 1)) * 4.0 ** -np.array([2, 2, 3, 3, 4, 4]) * np.exp(0.3 * rng.normal(size=(2000, 6)))
    total = largest_total(weight_IF, 200_001)
    best = solve(cost_IF, weight_IF, total)
    monkeypatch.setattr(core, "WORK_LIMIT", -1)
    early = solve(cost_IF, weight_IF, total)
    assert best.gap == 0.0
    assert early.gap > 0.0
    assert weight_IF[np.arange(2000), early.choice_I].sum() == total
    assert best.cost < early.cost <= best.cost + early.gap * (1 + 1e-9)


def too_wide(*_):
    raise core.TooWide


def test_a_gap_of_shares_is_a_bound(monkeypatch):
    rng = np.random.default_rng(3)
    weight_IF = np.array([[0, 1, 2], [0, 7, 14]])[np.arange(300) % 2]
    cost_IF = np.sort(rng.random((300, 3)), axis=1)[:, ::-1].copy()
    best = solve(cost_IF, weight_IF, 1000)
    monkeypatch.setattr(knapsack, "FIRST_TRY", -1)
    assert solve(cost_IF, weight_IF, 1000).cost == pytest.approx(best.cost, rel=1e-12)
    monkeypatch.setattr(split, "MOST_TRIALS", 1)
    monkeypatch.setattr(knapsack, "cheapest", too_wide)  # so that the answer is the shares' own
    early = solve(cost_IF, weight_IF, 1000)
    assert best.cost <= early.cost * (1 + 1e-12)
    assert early.cost <= best.cost + early.gap + 1e-12


def test_forbidden_and_broken_costs_are_refused():
    weight_IF = np.array([[2, 3, 4]] * 3)
    cost_IF = np.ones((3, 3))
    for bad, line in [(np.nan, "item 1 is not a number"), (-np.inf, "item 1 is not a number")]:
        broken = cost_IF.copy()
        broken[1, 2] = bad
        with pytest.raises(BadInput, match="item 1") as caught:
            solve(broken, weight_IF, 9)
        assert line in caught.value.line and caught.value.hint
    none = cost_IF.copy()
    none[2] = np.inf
    with pytest.raises(BadInput, match="item 2 is allowed no format"):
        solve(none, weight_IF, 9)
    with pytest.raises(BadInput, match="weighs exactly 13"):
        solve(cost_IF, weight_IF, 13)
    with pytest.raises(BadInput, match="weighs exactly 5"):
        solve(cost_IF, weight_IF, 5)


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(0, 40))
def test_slack_lets_the_cheapest_near_total_win(problem, slack):
    """Equal to the best of brute force over every total from `total - slack` to `total`."""
    cost_IF, weight_IF, total, _ = problem
    none = np.zeros_like(weight_IF)
    wants = [brute(cost_IF, weight_IF, t, none) for t in range(total - slack, total + 1)]
    if wants[-1] is None:  # the total itself must be one that a choice reaches
        return
    best = min(w[1] for w in wants if w is not None)
    found = solve(cost_IF, weight_IF, total, slack)
    assert total - slack <= weight_IF[np.arange(len(weight_IF)), found.choice_I].sum() <= total
    assert found.cost == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert found.gap == 0.0


def test_shapes_with_nothing_in_common_are_refused_not_guessed(monkeypatch):
    monkeypatch.setattr(core, "WORK_LIMIT", 1000)
    rng = np.random.default_rng(0)
    weight_IF = rng.integers(1, 10**9, (60, 3))
    total = int(weight_IF[:, 0].sum()) + 1
    with pytest.raises(BadInput, match="too little in common"):
        solve(rng.random((60, 3)), weight_IF, total)


# --------------------------------------------------------------------------------------------------- the same


def test_ties_go_to_the_lower_index_and_the_first_column():
    weight_IF = np.array([[2, 3, 4]] * 5)
    assert solve(np.zeros((5, 3)), weight_IF, 13).choice_I.tolist() == [2, 1, 0, 0, 0]
    same = np.tile([1.0, 0.5, 0.25], (5, 1))  # convex: everyone's first step comes before anyone's second
    assert solve(same, weight_IF, 13).choice_I.tolist() == [1, 1, 1, 0, 0]
    twice = np.array([[2, 3, 3, 4]] * 5)
    assert solve(np.tile([1.0, 0.5, 0.5, 0.25], (5, 1)), twice, 13).choice_I.tolist() == [1, 1, 1, 0, 0]


def test_same_inputs_same_choice():
    weight_IF = np.array([[274, 292, 403, 422], [60, 64, 90, 95]])[np.arange(700) % 2]
    cost_IF = np.round(costs(700, [2.1, 2, 3.1, 3], 0.5, seed=1), 3)  # rounded, so that many tie
    total = largest_total(weight_IF, 180_000)
    first = solve(cost_IF, weight_IF, total)
    backwards = solve(np.asfortranarray(cost_IF), np.asfortranarray(weight_IF), total)
    assert (first.choice_I == backwards.choice_I).all() and first == first
    assert first.cost == backwards.cost
    assert first.choice_I.dtype == np.int64


def test_inputs_are_left_as_they_were():
    weight_IF, cost_IF = np.array([[2, 3, 4]] * 9), costs(9, [2, 3, 4], 0.6, seed=1)
    cost_IF[0, 1] = np.inf
    before = weight_IF.copy(), cost_IF.copy()
    solve(cost_IF, weight_IF, 26)
    assert (weight_IF == before[0]).all() and (cost_IF == before[1]).all()
