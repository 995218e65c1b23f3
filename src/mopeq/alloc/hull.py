"""The lower convex hulls of all items' formats: what a better format of each item costs, in the best order of buying.

Draw an item's formats as points (units, cost). The lower hull from its fewest units to its most is a chain of edges,
each buying units at a rising price; its *bargain* is the cost saved per unit. Edges of all items, best bargain first,
are the best way to spend units one after another (the linear relaxation of the multiple-choice knapsack).

Costs have two levels, compared like words in a dictionary: `first` (int64, exact; bytes where the units are code bits,
zeros otherwise) and `cost` (float64). Such pairs can be added, scaled and ordered, which is all that is needed.

Ties break alike on any machine: elementwise IEEE arithmetic and stable sorts, no sum whose order may vary. Of equal
bargains the item of lower index is upgraded first, of equal formats the first is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Items:
    """Items by formats: units >= 0, two levels of cost, and which formats are allowed (others' costs are ignored)."""

    units_IF: Ints
    first_IF: Ints
    cost_IF: Floats
    allowed_IF: Bools

    def part(self, of: Ints) -> Items:
        return Items(self.units_IF[of], self.first_IF[of], self.cost_IF[of], self.allowed_IF[of])


@dataclass(frozen=True)
class Edges:
    """All items' hull edges, best bargain first, and within an item in order of units."""

    start_I: Ints  # the format of fewest units, where an item's hull begins
    item_J: Ints
    to_J: Ints
    units_J: Ints  # > 0
    first_J: Ints  # change of `first` along the edge
    bargain_J: Floats  # cost saved per unit
    reach_J: Ints  # running sum of units_J


def make_items(units_IF: Ints, first_IF: Ints, cost_IF: Floats, allowed_IF: Bools) -> Items:
    """Of an item's formats with equal units keep only the cheapest, the first of equals."""
    allowed_IF = allowed_IF.copy()
    cost_IF = np.where(allowed_IF, cost_IF, 0.0)
    for f in range(units_IF.shape[1]):
        for g in range(f + 1, units_IF.shape[1]):
            both_I = allowed_IF[:, f] & allowed_IF[:, g] & (units_IF[:, f] == units_IF[:, g])
            later_wins_I = less(first_IF[:, g], cost_IF[:, g], first_IF[:, f], cost_IF[:, f])
            allowed_IF[:, f] &= ~(both_I & later_wins_I)
            allowed_IF[:, g] &= ~(both_I & ~later_wins_I)
    return Items(units_IF, first_IF, cost_IF, allowed_IF)


def hull_edges(items: Items) -> Edges:
    """Walk every item's lower hull at once, from fewest units up."""
    rows = np.arange(len(items.units_IF))
    start_I = np.where(items.allowed_IF, items.units_IF, np.iinfo(np.int64).max).argmin(1).astype(np.int64)
    at_I, was1_I, was2_I = start_I, np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    found: list[tuple[npt.NDArray, ...]] = []
    while True:
        to_I, one_I, two_I = _next_vertex(items, at_I)
        if (to_I < 0).all():
            break
        # bargains fall along a hull: keep rounding from letting an item's later edge overtake an earlier one
        two_I = np.where(one_I == was1_I, np.minimum(two_I, was2_I), two_I)
        item = np.flatnonzero(to_I >= 0)
        here, there = at_I[item], to_I[item]
        units = items.units_IF[item, there] - items.units_IF[item, here]
        first = items.first_IF[item, there] - items.first_IF[item, here]
        found.append((item, there, units, first, one_I[item], two_I[item], np.full(len(item), len(found))))
        at_I, was1_I, was2_I = np.where(to_I >= 0, to_I, at_I), one_I, two_I
    if not found:
        none = np.zeros(0, dtype=np.int64)
        return Edges(start_I, none, none, none, none, np.zeros(0), none)
    item, to, units, first, one, two, turn = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((turn, item, -two, -one))
    units = units[order]
    return Edges(start_I, item[order], to[order], units, first[order], two[order], np.cumsum(units))


def _next_vertex(items: Items, at_I: Ints) -> tuple[Ints, Floats, Floats]:
    """From format at_I: the format of more units with the best bargain (nearest of equals; -1 if none), and bargains.

    Bargains of `first` are quotients of integers below 2^53, correctly rounded: equal where the fractions are equal.
    """
    rows = np.arange(len(at_I))
    units_I, first_I, cost_I = (a[rows, at_I] for a in (items.units_IF, items.first_IF, items.cost_IF))
    to_I, rise_I = np.full(len(rows), -1, dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    best1_I, best2_I = np.full(len(rows), -np.inf), np.full(len(rows), -np.inf)
    for f in range(items.units_IF.shape[1]):
        rise = items.units_IF[:, f] - units_I
        with np.errstate(divide="ignore", invalid="ignore"):
            one, two = (first_I - items.first_IF[:, f]) / rise, (cost_I - items.cost_IF[:, f]) / rise
        nearer = (one == best1_I) & (two == best2_I) & (rise < rise_I)
        better = (less(best1_I, best2_I, one, two) | nearer) & items.allowed_IF[:, f] & (rise > 0)
        for target, value in ((to_I, f), (rise_I, rise), (best1_I, one), (best2_I, two)):
            np.copyto(target, value, where=better)
    return to_I, best1_I, best2_I


def less(a1, a2, b1, b2):  # type: ignore[no-untyped-def]
    """(a1, a2) < (b1, b2), elementwise, as words are ordered."""
    return (a1 < b1) | (a1 == b1) & (a2 < b2)
