"""The allocators of the table: each turns a problem, its costs and an exact target into one format an item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mopeq.alloc import baselines
from mopeq.alloc import knapsack as exact
from mopeq.alloc.kmeans import cluster
from mopeq.errors import BadInput
from mopeq.plan import Problem, Target
from mopeq.progress import say

DEAR = 0.01  # of a map's cost


@dataclass(frozen=True)
class Question:
    """What an allocator is asked. `cost_JF` are items' costs by format (after the running minimum), `score_J` their
    raw scores; both are None for those that ask for none. `target` is None for kmeans."""

    problem: Problem
    cost_JF: np.ndarray | None
    score_J: np.ndarray | None
    target: Target | None
    scope: str
    seed: int


def knapsack(q: Question) -> np.ndarray:
    assert q.cost_JF is not None and q.target is not None
    return least_cost(q, q.cost_JF)


def least_cost(q: Question, cost_JF: np.ndarray) -> np.ndarray:
    """The cheapest choice that spends the target.

    Code bits are spent exactly. Bytes too, unless that were dear: where a bit costs 4,550 bytes in one projection and
    4,560 in another, a total of bytes dictates how many bits each projection gets, whatever they are worth. If leaving
    less than the smallest step unspent makes the map cheaper by more than `DEAR`, it is left, and stored as padding; so
    it is where an exact total cannot be found in reasonable time.
    """
    assert q.target is not None
    p = q.problem
    if q.target.code_bits is not None:
        found = exact.solve(cost_JF, p.code_JF, q.target.code_bits)
    else:
        refused: exact.TooOdd | None = None
        try:
            found = exact.solve(cost_JF, p.bytes_JF, q.target.expert_bytes)
        except exact.TooOdd as error:
            refused = error
        step_JF = np.diff(np.sort(p.bytes_JF, axis=1), axis=1)
        slack = int(step_JF[step_JF > 0].min(initial=q.target.expert_bytes)) - 1
        if slack >= int(np.gcd.reduce(step_JF, axis=None)):  # else the steps are alike, and nothing less can be spent
            near = exact.solve(cost_JF, p.bytes_JF, q.target.expert_bytes, slack)
            if refused or near.cost < found.cost - DEAR * abs(found.cost):
                found, refused = near, None
        if refused:
            raise refused
    if found.gap > 0:
        say(f"allocate: stopped early; the map's cost {found.cost:.4g} is at most {found.gap:.2g} above the least")
    return found.choice_I


def inverted(q: Question) -> np.ndarray:
    """The knapsack with every item given the costs of its mirror image in the ranking: what matters most gets least."""
    assert q.cost_JF is not None
    order = np.argsort(q.cost_JF[:, 0], kind="stable")
    mirrored_JF = np.empty_like(q.cost_JF)
    mirrored_JF[order] = q.cost_JF[order[::-1]]
    return least_cost(q, mirrored_JF)


def kmeans(q: Question) -> np.ndarray:
    """The paper's: cluster scores, one cluster a width, over the model or in each layer."""
    if q.score_J is None:
        raise BadInput("kmeans clusters scores, and this sensitivity has none", "try --sensitivity hessian")
    widths = [f.bits for f in q.problem.formats]
    if len(set(widths)) < len(widths):
        raise BadInput("kmeans takes one group size", "give a single --group-size")
    choice_J = np.empty(len(q.score_J), dtype=np.int64)
    layers = np.unique(q.problem.layer_of_J) if q.scope == "layer" else [None]
    for layer in layers:
        mine = slice(None) if layer is None else q.problem.layer_of_J == layer
        choice_J[mine] = cluster(q.score_J[mine], widths)
    return choice_J


def uniform(q: Question) -> np.ndarray:
    """Every item in the one format whose totals are the target."""
    assert q.target is not None
    fits_F = q.problem.bytes_JF.sum(0) == q.target.expert_bytes
    return baselines.uniform(len(q.problem.bytes_JF), int(np.flatnonzero(fits_F)[0]))


def random(q: Question) -> np.ndarray:
    assert q.target is not None
    if q.target.code_bits is None:
        return baselines.random_mix(q.problem.bytes_JF, q.target.expert_bytes, q.seed)
    return baselines.random_mix(q.problem.code_JF, q.target.code_bits, q.seed)
