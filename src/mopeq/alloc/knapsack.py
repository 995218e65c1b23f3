"""The choice of least summed cost that spends a total exactly: each item one format, optimal or with a proven gap.

    minimise sum_i cost[i, f_i]   subject to   sum_i weight[i, f_i] = total

The total comes from `reach.py`. Weights are measured above each item's least, in units of their greatest common
divisor: for widths 2, 3, 4 of one shape they are 0, 1 and 2, and `core.py` needs hardly more than a sort. Nothing is
assumed of the costs: they need not be convex, nor fall with the width, nor be positive; +inf forbids a format.

`solve_code` has two levels: weights are code bits, and among choices of exactly that many code bits those of fewest
bytes come first; cost decides among these.

Where shapes differ oddly (2967 units a bit for one projection, 2968 for another), the exact total dictates how many
units go to which shape, far from where the costs alone would put them. Then `split.py` decides first how the total is
shared, and the core spends each share. Where a share would be as hard to spend as the whole, it is not shared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mopeq.alloc.core import TooWide, cheapest
from mopeq.alloc.hull import Floats, Ints, Items, hull_edges, make_items
from mopeq.alloc.split import by_step, cheapest_split
from mopeq.errors import BadInput

FIRST_TRY = 200_000  # work given to treating all shapes together before splitting the total among them
MOST_PARTS = 8  # steps among which a total is shared
WIDEST_SHARED = 512  # steps that one item may move; beyond it a share takes seconds to spend, and there are thousands
LARGEST = 2**48  # of a first-level cost times the units of a move: sums of a few thousand stay within 64 bits


class TooOdd(BadInput):
    """Shapes so odd that the exact search would not end in reasonable time."""


@dataclass(frozen=True)
class Solution:
    """The chosen format of each item, its summed cost (exactly rounded), and a bound on what an optimum could save."""

    choice_I: Ints
    cost: float
    gap: float  # 0.0: optimal


def solve(cost_IF: Floats, weight_IF: Ints, total: int, slack: int = 0) -> Solution:
    """The cheapest choice of one format an item with summed weight `total`, or up to `slack` less than a reachable one.

    cost_IF [items, formats], +inf where a format is forbidden; weight_IF int64 of the same shape, >= 0.
    Of several optimal choices the same one is returned on every machine: of equal bargains the item of lower index gets
    the wider format, of equal formats the first column is taken.
    Raises BadInput: NaN or -inf costs, an item with every format forbidden, a total that no choice meets; TooOdd.
    """
    if slack and cost_IF.ndim == 2 and cost_IF.shape[1] > 1:
        unspent_XF = _unspent(weight_IF, slack)
        cost_IF = np.concatenate([cost_IF, np.zeros(unspent_XF.shape)])
        found = _solve(cost_IF, np.concatenate([weight_IF, unspent_XF]), None, total)
        return Solution(found.choice_I[: len(weight_IF)], found.cost, found.gap)
    return _solve(cost_IF, weight_IF, None, total)


def _unspent(weight_IF: Ints, slack: int) -> Ints:
    """Items without cost whose weights make up any multiple of the weights' unit up to `slack`: what is left over."""
    formats = weight_IF.shape[1]
    unit = int(np.gcd.reduce(weight_IF - weight_IF.min(1, keepdims=True), axis=None)) or 1
    left, size, rows = slack // unit, 1, []
    while left > 0:  # of 0, size, 2 size, ...: all below `size` are made up already
        step = min(size, -(-left // (formats - 1)))
        row = [min(step * f, left) for f in range(formats)]
        rows.append(row)
        left -= row[-1]
        size += row[-1]
    return unit * np.array(rows, dtype=np.int64).reshape(-1, formats)


def solve_code(cost_IF: Floats, code_IF: Ints, bytes_IF: Ints, code_total: int) -> Solution:
    """The cheapest choice among those of fewest bytes among those of exactly `code_total` code bits; else as `solve`.

    With negated bytes: among those of most bytes (which is how `reach.py` counts them, exactly).
    """
    return _solve(cost_IF, code_IF, bytes_IF, code_total)


def _solve(cost_IF: Floats, weight_IF: Ints, bytes_IF: Ints | None, total: int) -> Solution:
    _check(cost_IF, weight_IF)
    allowed_IF = cost_IF < np.inf
    low_I = np.where(allowed_IF, weight_IF, np.iinfo(np.int64).max).min(1)
    offset_IF = np.where(allowed_IF, weight_IF - low_I[:, None], 0)
    unit = int(np.gcd.reduce(offset_IF, axis=None)) or 1
    need, odd = divmod(total - int(low_I.sum()), unit)
    first_IF = np.zeros_like(weight_IF) if bytes_IF is None else bytes_IF - bytes_IF[:, :1]
    items = make_items(offset_IF // unit, first_IF, cost_IF, allowed_IF)
    if 2 * int(np.abs(first_IF).max()) * int(items.units_IF.max()) >= LARGEST:
        raise _too_odd()
    try:
        choice_I, gap = (None, 0.0) if odd else _spend(items, need, two_levels=bytes_IF is not None)
    except TooWide:
        raise _too_odd() from None
    if choice_I is None:
        raise BadInput(f"no choice of the allowed formats weighs exactly {total}", "allow another width with --bits")
    rows = np.arange(len(choice_I))
    assert int(weight_IF[rows, choice_I].sum()) == total and allowed_IF[rows, choice_I].all()
    return Solution(choice_I, math.fsum(cost_IF[rows, choice_I].tolist()), gap)


def _spend(items: Items, need: int, two_levels: bool) -> tuple[Ints | None, float]:
    """The cheapest choice of `need` units and its gap: all shapes together, or if that grows too wide, by shares; last
    all together again, with all the work allowed. The first answer without a gap, else that of the least gap."""
    edges, parts = hull_edges(items), by_step(items)
    widest = max(int(part.items.units_IF.max()) for part in parts)
    if two_levels or not 1 < len(parts) <= MOST_PARTS or widest > WIDEST_SHARED:
        return cheapest(items, edges, need)
    best: tuple[Ints | None, float] | None = None
    for search in (
        lambda: cheapest(items, edges, need, FIRST_TRY),
        lambda: cheapest_split(items, parts, need),
        lambda: cheapest(items, edges, need),  # where there are too many shares to list
    ):
        try:
            found = search()
        except TooWide:
            continue
        if found[1] == 0:
            return found  # optimal, or proven that there is none
        if best is None or found[1] < best[1]:
            best = found
    if best is None:
        raise TooWide
    return best


def _check(cost_IF: Floats, weight_IF: Ints) -> None:
    assert cost_IF.ndim == 2 and cost_IF.size and cost_IF.shape == weight_IF.shape, "costs and weights differ in shape"
    bad_I = np.isnan(cost_IF).any(1) | (cost_IF == -np.inf).any(1)
    if bad_I.any():
        raise BadInput(
            f"the cost of item {int(bad_I.argmax())} is not a number ({int(bad_I.sum())} such items)",
            "measure the sensitivities again; a NaN in a weight or an activation is the usual cause",
        )
    none_I = ~(cost_IF < np.inf).any(1)
    if none_I.any():
        raise BadInput(
            f"item {int(none_I.argmax())} is allowed no format ({int(none_I.sum())} such items)",
            "allow another width with --bits",
        )


def _too_odd() -> TooOdd:
    return TooOdd(
        "these shapes, widths and group sizes have too little in common for an exact allocation",
        "use one --group-size that divides the experts' dimensions, or fewer widths in --bits",
    )
