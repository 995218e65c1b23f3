"""How much a map would gain from more data: what maps made from halves of the data lose against one made from all."""

from __future__ import annotations

import numpy as np

from mopeq.alloc.hull import Floats, Ints

BUDGETS = (0.25, 0.5, 0.75)  # of the way from the fewest bytes to the most


def regret(cost_IF: Floats, halves_HIF: Floats, bytes_IF: Ints) -> float:
    """The mean share by which a map made from a half costs more than the map made from all, by the costs of all.

    Over both halves and some budgets, none of them a user's, so that sensitivity stays good for all. Maps are made by
    a price per byte (each row takes the cheapest of cost + price x bytes), and bytes are paid for.
    """
    rows, lost = np.arange(len(cost_IF)), []
    for share in BUDGETS:
        price = price_of(cost_IF, bytes_IF, share)
        paid_IF = cost_IF + price * bytes_IF
        best_I = paid_IF.argmin(1)
        whole = cost_IF[rows, best_I].sum()
        for half_IF in halves_HIF:
            chosen_I = (half_IF + price * bytes_IF).argmin(1)
            more = paid_IF[rows, chosen_I].sum() - paid_IF[rows, best_I].sum()
            lost.append(more / whole if whole > 0 else 0.0)
    return float(np.mean(lost))


def price_of(cost_IF: Floats, bytes_IF: Ints, share: float) -> float:
    """The price of a byte at which about that share of the bytes beyond the fewest are bought."""
    least, most = bytes_IF.min(1).sum(), bytes_IF.max(1).sum()
    low, high = -700.0, float(np.log(np.ptp(cost_IF) + 1e-300))  # logarithms; at the higher nobody buys a byte
    for _ in range(60):
        middle = (low + high) / 2
        choice_I1 = (cost_IF + np.exp(middle) * bytes_IF).argmin(1)[:, None]
        if np.take_along_axis(bytes_IF, choice_I1, 1).sum() > least + share * (most - least):
            low = middle
        else:
            high = middle
    return float(np.exp(high))
