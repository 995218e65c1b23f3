"""What making up missing units costs at least, if the cheapest move of each change could be made as often as one likes.

A shortest path: from a sum u, each change d leads to u + d at the least reduced cost of any move of that change, and
the sum aimed at costs nothing. It bounds every repair from below, and following it with real moves, each of another
item, mostly gives one that is nearly as cheap: between the two there is little left to search. Where items are alike
the two meet.

A path's moves can be ordered to rise below the aim and fall above it, so sums a few times the widest change away are
enough; beyond them the bound is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mopeq.alloc.hull import Floats, Ints, less

MOST_CELLS = 2_000_000  # sums times changes
MOST_PASSES = 100
FAR = 2**61  # no way found


@dataclass(frozen=True)
class Ways:
    """For each sum u = low, low + 1, ...: the least (first, cost) of a way to the aim, and its first change."""

    low: int
    first_U: Ints
    cost_U: Floats
    change_U: Ints

    def bound(self, units_S: Ints) -> tuple[Ints, Floats]:
        """The least (first, cost) from each sum; (0, 0) beyond the table, whose ends hold it."""
        at_S = np.clip(units_S - self.low, 0, len(self.first_U) - 1)
        return self.first_U[at_S], self.cost_U[at_S]

    def path(self, u: int, aim: int) -> list[int]:
        """The changes of a least way from u to the aim; empty if there is none in the table."""
        changes = []
        while u != aim and 0 < u - self.low < len(self.first_U) - 1 and (d := int(self.change_U[u - self.low])):
            changes.append(d)
            u += d
        return changes if u == aim else []


def least_ways(change_D: Ints, first_D: Ints, cost_D: Floats, aim: int) -> Ways:
    """The table for distinct changes (not 0) and their least reduced costs (>= 0), by relaxing until nothing improves.

    Where that takes too long or the table would be too large, it is empty: a bound of 0 everywhere.
    """
    nothing = Ways(0, np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64))
    span = 3 * int(np.abs(change_D).max()) + 1
    if (2 * span + 1) * len(change_D) > MOST_CELLS:
        return nothing
    first_U, cost_U = np.full(2 * span + 1, FAR), np.zeros(2 * span + 1)
    change_U = np.zeros(2 * span + 1, dtype=np.int64)
    first_U[span] = 0
    for _ in range(MOST_PASSES):
        moved = False
        for d, first, cost in zip(change_D.tolist(), first_D.tolist(), cost_D.tolist(), strict=True):
            here, there = (slice(0, -d), slice(d, None)) if d > 0 else (slice(-d, None), slice(0, d))
            one, two = first_U[there] + first, cost_U[there] + cost
            better = less(one, two, first_U[here], cost_U[here]) & (first_U[there] < FAR)
            if better.any():
                moved = True
                for table, value in ((first_U, one), (cost_U, two), (change_U, d)):
                    np.copyto(table[here], value, where=better)
        if not moved:
            first_U[[0, -1]], cost_U[[0, -1]] = 0, 0.0
            return Ways(aim - span, first_U, cost_U, change_U)
    return nothing
