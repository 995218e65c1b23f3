"""How an exact total is shared among items of different steps, each share then spent at least cost by `core.py`.

Items whose units are multiples of one step form a part; part p spends k_p steps and sum_p step_p * k_p must be `need`.
The hull gives a lower bound on each part's cost for every k at once. With the multiplier of the whole problem, the
bound becomes an excess >= 0 over the ideal, and total excess orders all ways of sharing. They are tried by rising
bound, each evaluated exactly, until the next bound is no better than the best found. Which to try is found by raising
a limit on the excess: every sharing within the limit is listed, so the best within it is proven.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mopeq.alloc.core import TooWide, cheapest
from mopeq.alloc.hull import Edges, Floats, Ints, Items, hull_edges

MOST_SHARINGS = 20_000_000  # listed at once
MOST_STEPS = 50_000_000  # length of the parts' bounds
MOST_TRIALS = 2_000  # sharings evaluated, some milliseconds each; past it the gap is reported


@dataclass(frozen=True)
class Part:
    """Items of one step; their units are counted in steps."""

    of_I: Ints  # which of all items
    step: int
    items: Items


@dataclass(frozen=True)
class Bound:
    """A part's hull, and for each number of steps its excess over `floor`, at least."""

    part: Part
    edges: Edges
    multiplier: float
    floor: float
    excess_K: Floats

    def evaluate(self, k: int) -> tuple[float, float]:
        """The excess of spending k steps at least cost, inf where no choice does, and its gap."""
        choice_I, gap = cheapest(self.part.items, self.edges, k)
        if choice_I is None:
            return math.inf, 0.0
        rows = np.arange(len(choice_I))
        cost_I = self.part.items.cost_IF[rows, choice_I] - self.part.items.cost_IF[rows, self.edges.start_I]
        return math.fsum([*cost_I.tolist(), self.multiplier * k, -self.floor]), gap


def by_step(items: Items) -> list[Part]:
    """Group items by the greatest common divisor of their units. Items that cannot change go with the first."""
    step_I = np.gcd.reduce(np.where(items.allowed_IF, items.units_IF, 0), axis=1)
    steps = [int(s) for s in np.unique(step_I) if s] or [1]
    step_I[step_I == 0] = steps[0]
    parts = []
    for step in steps:
        of_I = np.flatnonzero(step_I == step)
        part = items.part(of_I)
        parts.append(Part(of_I, step, Items(part.units_IF // step, part.first_IF, part.cost_IF, part.allowed_IF)))
    return parts


def cheapest_split(items: Items, parts: list[Part], need: int) -> tuple[Ints | None, float]:
    """The cheapest choice of `need` units and its proven gap, for one level of cost; (None, 0) if there is none.

    Raises TooWide where the limits leave neither an answer nor the proof that there is none.
    """
    bounds = _bounds(items, parts, need)
    if bounds is None:
        return None, 0.0
    best_ks, gap = _search(bounds, need)
    if best_ks is None:
        return None, 0.0
    choice_I = np.zeros(len(items.units_IF), dtype=np.int64)
    for bound, k in zip(bounds, best_ks, strict=True):
        choice, _ = cheapest(bound.part.items, bound.edges, k)
        assert choice is not None
        choice_I[bound.part.of_I] = choice
    return choice_I, gap


def _search(bounds: list[Bound], need: int) -> tuple[tuple[int, ...] | None, float]:
    """The best sharing (k of each part; None if there is none) and its gap."""
    known: dict[tuple[int, int], tuple[float, float]] = {}
    best, best_ks, proven = math.inf, None, math.inf  # no sharing costs less than `proven`
    for ks, bound in _by_rising_bound(bounds, need):
        if bound >= best:
            break
        if ks is None or len(known) >= MOST_TRIALS:
            proven = min(proven, bound)
            break
        for p, k in enumerate(ks):
            if (p, k) not in known:
                known[p, k] = bounds[p].evaluate(k)
        total, gap = (math.fsum(known[p, k][n] for p, k in enumerate(ks)) for n in (0, 1))
        proven = min(proven, total - gap)
        if total < best:
            best, best_ks = total, ks
    if best_ks is None and proven < math.inf:
        raise TooWide
    return best_ks, 0.0 if best_ks is None else best - min(best, proven)


def _by_rising_bound(bounds: list[Bound], need: int) -> Iterator[tuple[tuple[int, ...] | None, float]]:
    """All sharings of `need` and their bounds, lowest bound first; None in place of those too many to list."""
    done, limit = -1.0, _first_limit(bounds)
    everything = math.fsum(float(b.excess_K.max()) for b in bounds)
    while done <= everything:
        listed = _sharings(bounds, need, limit)
        if listed is None:
            yield None, max(done, 0.0)
            return
        ks_SP, excess_S = listed
        for s in np.argsort(excess_S, kind="stable"):
            if excess_S[s] > done:
                yield tuple(ks_SP[s].tolist()), float(excess_S[s])
        done, limit = limit, 4 * limit


def _bounds(items: Items, parts: list[Part], need: int) -> list[Bound] | None:
    """The parts' lower bounds, longest last; None if `need` is out of range."""
    whole = hull_edges(items)
    if need < 0 or need > int(whole.units_J.sum()):
        return None
    if sum(int(part.items.units_IF.max(1).sum()) for part in parts) > MOST_STEPS:
        raise TooWide
    break_edge = min(int(np.searchsorted(whole.reach_J, need, side="right")), len(whole.reach_J) - 1)
    multiplier = float(whole.bargain_J[break_edge])
    bounds = []
    for part in parts:
        edges = hull_edges(part.items)
        k = np.arange(int(edges.units_J.sum()) + 1)
        cost = np.cumsum(-edges.bargain_J * edges.units_J)
        excess_K = np.interp(k, np.append(0, edges.reach_J), np.append(0.0, cost)) + multiplier * part.step * k
        floor = float(excess_K.min())
        bounds.append(Bound(part, edges, multiplier * part.step, floor, excess_K - floor))
    return sorted(bounds, key=lambda b: len(b.excess_K))


def _first_limit(bounds: list[Bound]) -> float:
    """An excess of about one step off the ideal in the stiffest part; any positive number would do."""
    near = [float(b.excess_K[max(0, int(b.excess_K.argmin()) - 1) :][:3].max()) for b in bounds]
    return max(near) or min((float(b.excess_K[b.excess_K > 0].min(initial=np.inf)) for b in bounds), default=0.0)


def _sharings(bounds: list[Bound], need: int, limit: float) -> tuple[Ints, Floats] | None:
    """All (k of each part) that make up `need` with bounds summing to at most `limit`; None if too many to list.

    The last part's k follows from the others', so only these are multiplied out.
    """
    ks_SP, spent_S, excess_S = np.zeros((1, 0), np.int64), np.zeros(1, np.int64), np.zeros(1)
    for bound in bounds[:-1]:
        k = np.flatnonzero(bound.excess_K <= limit)
        if len(spent_S) * len(k) > MOST_SHARINGS:
            return None
        excess = (excess_S[:, None] + bound.excess_K[k]).ravel()
        spent = (spent_S[:, None] + bound.part.step * k).ravel()
        within = np.flatnonzero((excess <= limit) & (spent <= need))
        ks_SP = np.column_stack([ks_SP[within // len(k)], k[within % len(k)]])
        spent_S, excess_S = spent[within], excess[within]
    last = bounds[-1]
    k, odd = np.divmod(need - spent_S, last.part.step)
    fits = np.flatnonzero((odd == 0) & (k < len(last.excess_K)))
    ks_SP, excess_S = np.column_stack([ks_SP[fits], k[fits]]), excess_S[fits] + last.excess_K[k[fits]]
    within = np.flatnonzero(excess_S <= limit)
    return ks_SP[within], excess_S[within]
