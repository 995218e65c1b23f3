"""The cheapest choice of one format an item whose units sum to exactly k: a bound first, then a small repair.

The bound. Taking hull edges (`hull.py`), best bargain first, until k is nearly reached gives a base choice and a
multiplier: the bargain of the first edge that no longer fits. With it every format of every item has a reduced cost
r = change of cost + multiplier * change of units >= 0 against the base, and among choices of equal units ordering by
cost is ordering by the sum of r (Lagrangian relaxation).

The repair. The base lacks `need` units, 0 <= need < D, where D is the largest change of units that one move makes.
What remains is to pick moves (item, format), at most one an item, with changes summing to `need` and the least sum of
r. Items are taken in order of their cheapest move, keeping for each reachable sum its cheapest way; once a way to
`need` costs no more than the next item's cheapest move, nothing better can follow: it is optimal.

Why this stays small. Order the moves of an optimal choice so that a rising move follows any sum below `need` and a
falling one any sum above; all partial sums then lie in an interval of 2D - 1 values. Were two equal, the moves between
them would cancel and could be dropped at no loss, so at most 2D - 2 moves are needed; and for each change d only the
2D - 2 cheapest moves can matter, since among them is always an item not otherwise moved. For widths 2, 3 and 4 of one
shape D is 2. (The same exchange proves that integer programs have optima near their relaxation: Eisenbrand and
Weismantel, "Proximity results and faster algorithms for integer programming using the Steinitz lemma", 2018.)

The same search without "at most one an item" is a shortest path (`ways.py`): it bounds what is still ahead, and its
moves, made with real items, are the first answer. Where the two agree there is nothing to search. The search has a
limit; an answer stopped there comes with its gap over the bound.

Optimal means: up to rounding of r, some 1e-16 of the costs concerned.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mopeq.alloc.hull import Bools, Edges, Floats, Ints, Items, less
from mopeq.alloc.ways import FAR, Ways, least_ways

WORK_LIMIT = 10_000_000  # sums kept over all items of a repair: 8 bytes each for the way back, some seconds
NONE = (FAR, 0.0)  # beyond any cost


class TooWide(Exception):
    """The search outgrew its limit without an answer. Not yet a user's error: another path may do."""


@dataclass(frozen=True)
class Moves:
    """Changes to a base choice, none without a change of units, each with its reduced cost (first, cost) >= (0, 0)."""

    item_M: Ints
    to_M: Ints
    units_M: Ints
    first_M: Ints
    cost_M: Floats

    def part(self, of: Ints | Bools) -> Moves:
        return Moves(self.item_M[of], self.to_M[of], self.units_M[of], self.first_M[of], self.cost_M[of])


def cheapest(items: Items, edges: Edges, k: int, work_limit: int | None = None) -> tuple[Ints | None, float]:
    """The format of each item [I] of least cost whose units sum to k (None if no choice's do), and the proven gap.

    The gap is 0 unless the search was stopped at its limit; `first` is the least in any case. Raises TooWide if at the
    limit no such choice was found.
    """
    taken = int(np.searchsorted(edges.reach_J, k, side="right"))
    base_I = edges.start_I.copy()
    base_I[edges.item_J[:taken]] = edges.to_J[:taken]  # where an item is named repeatedly its last edge stands
    need = k - (int(edges.reach_J[taken - 1]) if taken else 0)
    if need == 0:
        return base_I, 0.0
    if need < 0 or taken == len(edges.item_J):
        return None, 0.0
    repair = _repair(_reduced(items, edges, base_I, taken), need, WORK_LIMIT if work_limit is None else work_limit)
    if repair is None:
        return None, 0.0
    made, moves, gap = repair
    base_I[moves.item_M[made]] = moves.to_M[made]
    return base_I, gap


def _reduced(items: Items, edges: Edges, base_I: Ints, edge: int) -> Moves:
    """All moves away from the base, with reduced costs for the multiplier of `edge`.

    The multiplier of `first` is a fraction of integers; `first` is scaled by its denominator, to stay exact.
    """
    rows, base = np.arange(len(base_I))[:, None], base_I[:, None]
    d_IF = items.units_IF - items.units_IF[rows, base]
    item_M, to_M = np.nonzero(items.allowed_IF & (d_IF != 0))
    d_M, from_M = d_IF[item_M, to_M], base_I[item_M]
    first_M = (items.first_IF[item_M, to_M] - items.first_IF[item_M, from_M]) * edges.units_J[edge]
    first_M -= edges.first_J[edge] * d_M
    cost_M = items.cost_IF[item_M, to_M] - items.cost_IF[item_M, from_M] + edges.bargain_J[edge] * d_M
    assert (first_M >= 0).all(), "the base is not on the hull"
    cost_M = np.where(first_M == 0, np.maximum(cost_M, 0.0), cost_M)  # below 0 only by rounding
    return Moves(item_M, to_M, d_M, first_M, cost_M)


def _repair(moves: Moves, need: int, work_limit: int) -> tuple[list[int], Moves, float] | None:
    """The moves, at most one an item, of least reduced cost whose units sum to `need`, and the gap; None if none do.

    A state is a sum of units with the cheapest way to it. From one that lacks u units it takes at least what `Ways`
    says, and at least |u| / D moves no cheaper than those of the item at hand: states that either puts beyond the best
    answer are dropped.
    """
    widest = int(np.abs(moves.units_M).max(initial=1))
    moves, begin_I = _core(moves, need, max(1, 2 * widest - 2))
    ways = _ways(moves, need)
    least = tuple(a.item() for a in ways.bound(np.zeros(1, np.int64)))
    best, made = _follow(moves, ways, need)
    best_at: tuple[int, int] | None = None
    units_S, first_S, cost_S = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
    work, gap = 0, 0.0
    for step, (a, b) in enumerate(pairwise(begin_I)):
        first, cost = int(moves.first_M[a]), float(moves.cost_M[a])  # the item's cheapest move
        lacking_S = np.minimum(-(-np.abs(need - units_S) // widest), 1000)  # bounded against overflow
        first_ahead_S, cost_ahead_S = ways.bound(units_S)
        keep = np.flatnonzero(
            less(first_S + first_ahead_S, cost_S + cost_ahead_S, *best)
            & less(first_S + lacking_S * first, cost_S + lacking_S * cost, *best)
        )
        if best <= max(least, (first, cost)) or not len(keep):
            break
        if work > work_limit:
            if best[0] > least[0]:
                raise TooWide
            gap = best[1] - least[1]
            break
        change = slice(a, b)  # row 0 below stands for leaving the item alone, row n for its nth move
        units = np.concatenate([[0], moves.units_M[change]])[:, None] + units_S[keep]
        firsts = np.concatenate([[0], moves.first_M[change]])[:, None] + first_S[keep]
        costs = np.concatenate([[0.0], moves.cost_M[change]])[:, None] + cost_S[keep]
        chosen = _cheapest_of_each_sum(units.ravel(), firsts.ravel(), costs.ravel())
        units_S, first_S, cost_S = units.flat[chosen], firsts.flat[chosen], costs.flat[chosen]
        row, column = np.divmod(chosen, len(keep))
        trail.append((keep[column].astype(np.int32), np.where(row > 0, a + row - 1, -1).astype(np.int32)))
        work += len(units_S)
        at = int(np.searchsorted(units_S, need))
        if at < len(units_S) and units_S[at] == need and (int(first_S[at]), float(cost_S[at])) < best:
            best, best_at = (int(first_S[at]), float(cost_S[at])), (step, at)
    if best_at is not None:
        made = _way_back(trail, *best_at)
    return (made, moves, gap) if best < NONE else None


def _way_back(trail: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]], step: int, at: int) -> list[int]:
    """The moves that led to a state, by its parents."""
    made = []
    for parent_S, move_S in reversed(trail[: step + 1]):
        if move_S[at] >= 0:
            made.append(int(move_S[at]))
        at = int(parent_S[at])
    return made


def _ways(moves: Moves, need: int) -> Ways:
    """The lower bound from the cheapest move of each change."""
    order = np.lexsort((moves.cost_M, moves.first_M, moves.units_M))
    one = moves.part(order[np.diff(moves.units_M[order], prepend=moves.units_M[order[:1]] - 1) != 0])
    return least_ways(one.units_M, one.first_M, one.cost_M, need)


def _follow(moves: Moves, ways: Ways, need: int) -> tuple[tuple[int, float], list[int]]:
    """The least way made with real moves, for each change the cheapest of an item not yet moved.

    Where they run out: the cheapest single move that makes up `need`, and if there is none, NONE. Summed from the end,
    as `least_ways` does: where all moves of a change cost the same, the two sums are the same.
    """
    order = np.lexsort((moves.cost_M, moves.first_M))
    path, used, made = ways.path(0, need), set(), []
    queues = {d: iter(order[moves.units_M[order] == d].tolist()) for d in set(path)}
    for d in path:
        m = next((m for m in queues[d] if int(moves.item_M[m]) not in used), None)
        if m is None:
            break
        used.add(int(moves.item_M[m]))
        made.append(m)
    if not path or len(made) < len(path):
        made = order[moves.units_M[order] == need][:1].tolist()
    first, cost = 0, 0.0
    for m in reversed(made):
        first, cost = first + int(moves.first_M[m]), cost + float(moves.cost_M[m])
    return ((first, cost), made) if made else (NONE, [])


def _core(moves: Moves, need: int, most: int) -> tuple[Moves, list[int]]:
    """The moves that can matter, items in order of their cheapest move (ties: index), and where each item begins.

    Those are the `most` cheapest of each change of units (formats of an item all differ in units, so these are of as
    many items), and if a single move makes up `need`, only those cheaper than the cheapest such move, and that one.
    Of equally cheap moves the first of every change come before the second of any: where all cost the same, a small
    assortment makes up `need` sooner than hundreds alike.
    """
    order = np.lexsort((moves.item_M, moves.cost_M, moves.first_M))
    if len(single := order[moves.units_M[order] == need]):
        order = order[: int(np.flatnonzero(order == single[0])[0]) + 1]
    moves = moves.part(order)
    order = np.argsort(moves.units_M, kind="stable")
    new = np.diff(moves.units_M[order], prepend=moves.units_M[order[:1]] - 1) != 0
    rank_M = np.empty(len(order), dtype=np.int64)  # among moves of the same change
    rank_M[order] = np.arange(len(order)) - np.flatnonzero(new)[np.cumsum(new) - 1]
    order = np.lexsort((moves.item_M, rank_M, moves.cost_M, moves.first_M))
    moves = moves.part(order[rank_M[order] < most])
    _, turn_I, item_M = np.unique(moves.item_M, return_index=True, return_inverse=True)
    moves = moves.part(np.argsort(turn_I[item_M], kind="stable"))
    begin_I = np.flatnonzero(np.diff(moves.item_M, prepend=-1) != 0)
    return moves, [*begin_I.tolist(), len(moves.item_M)]


def _cheapest_of_each_sum(units: Ints, first: Ints, cost: Floats) -> Ints:
    """Positions of the cheapest entry (the earliest of equals) for each value of units, ascending in units."""
    order = np.lexsort((cost, first, units))
    return order[np.diff(units[order], prepend=units[order[:1]] - 1) != 0]
