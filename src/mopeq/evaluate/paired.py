"""How sure a difference is: a paired bootstrap over items.

Two models are shown the same items, so what varies is each item's own difference; how hard the items are cancels. Items
are drawn again with replacement, the mean difference is taken of each draw, and 95 % of these lie in the interval
(Efron and Tibshirani 1993, §13: percentiles). Positions of one row are not independent, so a row is drawn as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DRAWS = 2000
AT_ONCE = 2**20  # items drawn at a time

Numbers = Sequence[float] | np.ndarray


def mean_of(value_I: Numbers, weight_I: Numbers | None = None, seed: int = 0) -> dict[str, Any] | None:
    """{"mean", "ci95", "n"} of sum(value) / sum(weight) over items; weights of 1 if None. None where all weigh nothing.

    value_I: each item's difference (summed over its positions where weight_I counts these). ci95 is None for one item,
    and where no item differs from another: drawing them again tells nothing then.
    """
    value = np.asarray(value_I, dtype=np.float64)
    weight = np.ones(len(value)) if weight_I is None else np.asarray(weight_I, dtype=np.float64)
    value, weight = value[weight > 0], weight[weight > 0]
    n = len(value)
    if n == 0:
        return None
    ratio = value / weight
    alike = bool((ratio == ratio[0]).all())
    ci95 = None if alike else [float(x) for x in np.quantile(_draw(value, weight, seed), [0.025, 0.975])]
    return {"mean": float(value.sum() / weight.sum()), "ci95": ci95, "n": n}


def _draw(value: np.ndarray, weight: np.ndarray, seed: int) -> np.ndarray:
    """The ratio of each of DRAWS samples; RandomState's stream is promised never to change."""
    rng, n, found = np.random.RandomState(seed), len(value), []
    step = max(1, AT_ONCE // n)
    for first in range(0, DRAWS, step):
        drawn = rng.randint(0, n, (min(step, DRAWS - first), n))
        found.append(value[drawn].sum(1) / weight[drawn].sum(1))
    return np.concatenate(found)
