"""What the allocators of the table make of a target: exact where that is fair, padded where exactness dictates."""

from __future__ import annotations

import numpy as np
import pytest

from mopeq.alloc import core
from mopeq.alloc import knapsack as exact
from mopeq.alloc.choose import Question, knapsack
from mopeq.alloc.reach import largest_total
from mopeq.nouns import Format
from mopeq.plan import Problem, Target

FORMATS = (Format(2), Format(3), Format(4))


def question(steps, weights_J, budget_share, code=False):
    """Items whose bytes a bit are `steps` in turn, and whose cost falls by a quarter a bit from `weights_J`."""
    items = np.arange(len(weights_J))
    step_J = np.array(steps)[items % len(steps)]
    bytes_JF = step_J[:, None] * np.array([2, 3, 4]) + 500
    code_JF = np.tile(4096 * np.array([2, 3, 4]), (len(items), 1))
    cost_JF = np.asarray(weights_J)[:, None] * 4.0 ** -np.array([2, 3, 4])
    problem = Problem(FORMATS, items, code_JF, bytes_JF, items * 0)
    unit = code_JF if code else bytes_JF
    limit = int(unit[:, 0].sum() + budget_share * (unit[:, 2] - unit[:, 0]).sum())
    total = largest_total(unit, limit)
    target = Target(int(bytes_JF[:, 1].sum()), total) if code else Target(total, None)
    return Question(problem, cost_JF, None, target, "model", 0)


def spent(q, choice_J):
    return int(q.problem.bytes_JF[np.arange(len(choice_J)), choice_J].sum())


def test_bytes_are_spent_exactly_where_steps_are_alike():
    q = question([512], np.exp(np.random.default_rng(0).normal(size=300)), 0.25)
    assert spent(q, knapsack(q)) == q.target.expert_bytes


def test_nearly_equal_steps_do_not_dictate_the_split():
    """4,550 and 4,560 bytes a bit: an exact total would give both kinds the same bits, though one matters ten-fold."""
    rng = np.random.default_rng(1)
    weights_J = np.exp(rng.normal(size=480)) * np.array([1, 1, 10])[np.arange(480) % 3]
    q = question([4550, 4550, 4560], weights_J, 0.25)
    choice_J = knapsack(q)
    assert 0 <= q.target.expert_bytes - spent(q, choice_J) < 4550
    assert choice_J[2::3].mean() > choice_J[0::3].mean() + 0.4
    best = question([4550], weights_J, 0.25)  # the same costs where no byte differs
    cost, least = (float(q.cost_JF[np.arange(480), c].sum()) for c in (choice_J, knapsack(best)))
    assert cost <= 1.005 * least


def test_where_no_exact_total_is_found_in_time_a_little_is_left(monkeypatch):
    """With hardly any work allowed the exact search gives up on nearly equal steps; a total a little below is found."""
    rng = np.random.default_rng(3)
    q = question([4550, 4550, 4560], np.exp(rng.normal(size=480)), 0.25)
    monkeypatch.setattr(exact, "MOST_PARTS", 0)
    monkeypatch.setattr(core, "WORK_LIMIT", 1)
    with pytest.raises(exact.TooOdd):
        exact.solve(q.cost_JF, q.problem.bytes_JF, q.target.expert_bytes)
    assert 0 <= q.target.expert_bytes - spent(q, knapsack(q)) < 4550


def test_code_bits_are_met_exactly_and_cost_alone_decides():
    rng = np.random.default_rng(2)
    q = question([4550, 4560], np.exp(rng.normal(size=400)) * np.array([1, 10])[np.arange(400) % 2], 0.25, code=True)
    choice_J = knapsack(q)
    assert q.problem.code_JF[np.arange(400), choice_J].sum() == q.target.code_bits
    assert choice_J[1::2].mean() > choice_J[0::2].mean() + 0.4
