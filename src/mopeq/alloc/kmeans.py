"""The paper's assignment (MoPEQ): 1-D k-means over scores, one cluster per width, the highest mean gets the most bits.

In one dimension clusters are intervals of the sorted scores, so the optimum is found outright, without random starts.
With N scores of sum S in a cluster, its squared deviations are (sum of squares) - S^2 / N, so minimising them is
maximising the sum of S^2 / N over clusters. Let best[c][j] be the most that c clusters make of the first j values:

    best[c][j] = max over i of best[c-1][i] + gain(i, j),    gain(i, j) = S(i, j)^2 / N(i, j)

The best i never falls as j grows (gain satisfies the quadrangle inequality), so each row takes m log m by halving.
There is no budget: sizes of clusters fall as they may.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mopeq.alloc.hull import Floats, Ints
from mopeq.errors import BadInput


def cluster(score_I: Floats, widths: Sequence[int], seed: int = 0) -> Ints:
    """The column of `widths` (ascending) for each item [I]: the k-means optimum, highest mean to the widest.

    Equal scores share a width. With fewer distinct scores than widths each distinct score is a cluster, and the
    narrowest widths are used: where no difference is seen, no bits are spent on it. Of equal optima the one whose upper
    clusters begin lowest is taken. `seed` changes nothing: the optimum has no random start.
    Raises BadInput for scores that are NaN or infinite.
    """
    assert list(widths) == sorted(set(widths)) and len(widths) > 0, "widths ascend"
    if not np.isfinite(score_I).all():
        bad = int((~np.isfinite(score_I)).argmax())
        raise BadInput(f"the score of item {bad} is not a finite number", "measure the sensitivities again")
    if not len(score_I):
        return np.zeros(0, dtype=np.int64)
    values, value_of_I, counts = np.unique(score_I, return_inverse=True, return_counts=True)
    starts = _starts(values, counts, min(len(widths), len(values)))
    return (np.searchsorted(starts, value_of_I, side="right") - 1).astype(np.int64)


def _starts(values: Floats, counts: Ints, clusters: int) -> list[int]:
    """Where each cluster begins among the ascending distinct values."""
    scale = float(np.abs(values).max()) or 1.0  # so that no square overflows
    centred = values / scale - math.fsum((values / scale * counts).tolist()) / int(counts.sum())
    count = np.append(0, np.cumsum(counts)).astype(np.float64)
    total = np.append(0.0, np.cumsum(centred * counts))
    m = len(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        best = total**2 / count  # one cluster; best[j] is of the first j values
    choices = []
    for c in range(2, clusters + 1):
        best, choice = _one_more(best, count, total, c, m)
        choices.append(choice)
    starts, j = [], m
    for choice in reversed(choices):
        j = int(choice[j])
        starts.append(j)
    return [0, *reversed(starts)]


def _one_more(best: Floats, count: Floats, total: Floats, c: int, m: int) -> tuple[Floats, Ints]:
    """The row of c clusters from that of c - 1: for each j the most, and where the last cluster begins."""
    row, choice = np.full(m + 1, -np.inf), np.zeros(m + 1, dtype=np.int64)
    todo = [(c, m, c - 1, m - 1)]  # j from, to; i from, to
    while todo:
        low, high, first, last = todo.pop()
        if low > high:
            continue
        j = (low + high) // 2
        i = slice(first, min(last, j - 1) + 1)
        made = best[i] + (total[j] - total[i]) ** 2 / (count[j] - count[i])
        at = int(made.argmax())
        row[j], choice[j] = made[at], first + at
        todo += [(low, j - 1, first, first + at), (j + 1, high, first + at, last)]
    return row, choice
