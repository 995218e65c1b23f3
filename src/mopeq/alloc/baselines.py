"""What a clever allocation must beat at equal bytes, and how plain scores become costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mopeq.alloc.hull import Floats, Ints
from mopeq.alloc.knapsack import solve
from mopeq.alloc.reach import largest_total
from mopeq.errors import BadInput


def uniform(items: int, column: int) -> Ints:
    """Every item in the same format."""
    return np.full(items, column, dtype=np.int64)


def random_mix(weight_IF: Ints, total: int, seed: int) -> Ints:
    """Every item in the lower format and seeded random upgrades to the next, meeting `total` exactly.

    Lower is the format in which all items together weigh at most `total`, next the one after it by weight. Each item
    draws u in [0, 1); its upgrade costs u times its added weight, so upgrades come in the order of u whatever the
    shapes, and the exact solver picks those that meet the total. Where the two formats cannot, the others are let in
    for more per weight than the upgrades that are bought anyway, so that few items take them.
    """
    order = np.argsort(weight_IF.sum(0), kind="stable")
    sums = weight_IF.sum(0)[order]
    order = order[np.diff(sums, prepend=-1) != 0]  # of formats of equal weight, the first
    at = max(0, int(np.searchsorted(weight_IF.sum(0)[order], total, side="right")) - 1)
    pair = order[at : at + 2]
    draw = np.random.RandomState(seed)  # its stream is promised never to change
    u_I, u_IF = draw.random_sample(len(weight_IF)), draw.random_sample(weight_IF.shape)
    distance_IF = np.abs(weight_IF - weight_IF[:, pair[:1]])
    bought = (total - int(weight_IF[:, pair[0]].sum())) / max(1, int(distance_IF[:, pair[-1]].sum()))
    cost_IF = (min(max(bought, 0.0), 1.0) + u_IF) * distance_IF
    if largest_total(weight_IF[:, pair], total) == total:
        cost_IF[:] = np.inf
    cost_IF[:, pair] = u_I[:, None] * distance_IF[:, pair]
    return solve(cost_IF, weight_IF, total).choice_I


def costs_from_scores(score_I: Floats, bits_F: Sequence[int]) -> Floats:
    """One score per item made a cost per format: score * 4^(-bits), the usual decline of rounding noise.

    Negative scores give negative costs, which the knapsack takes but `running_min` would make 0.
    """
    return np.ldexp(np.asarray(score_I, dtype=np.float64)[:, None], -2 * np.asarray(bits_F, dtype=np.int64))


def running_min(cost_IF: Floats) -> Floats:
    """Costs an allocator may trust: max(cost, 0), and never more than at a narrower width (columns ascend in width).

    A format forbidden by +inf stays forbidden, whatever its narrower neighbour costs. NaN raises BadInput.
    """
    if np.isnan(cost_IF).any():
        raise BadInput(
            f"the cost of item {int(np.isnan(cost_IF).any(1).argmax())} is not a number",
            "measure the sensitivities again; a NaN in a weight or an activation is the usual cause",
        )
    low_IF = np.minimum.accumulate(np.maximum(cost_IF, 0.0), axis=1)
    return np.where(np.isposinf(cost_IF), np.inf, low_IF)
