"""What maps of halves lose: none where halves agree, and the more the noisier they are; budgets are met by price."""

from __future__ import annotations

import numpy as np
import pytest

from mopeq.alloc.halves import BUDGETS, price_of, regret


def problem(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cost = np.exp(rng.normal(size=(rows, 1)) * 2) * 4.0 ** -np.arange(2, 5) * np.exp(rng.normal(size=(rows, 3)) * 0.1)
    size = rng.choice([100, 300], rows)
    return cost, np.stack([size * bits + size // 4 for bits in (2, 3, 4)], 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_price_buys_its_share_of_bytes(seed: int) -> None:
    cost, nbytes = problem(400, seed)
    for share in BUDGETS:
        choice = (cost + price_of(cost, nbytes, share) * nbytes).argmin(1)
        spent = nbytes[np.arange(400), choice].sum()
        wanted = nbytes[:, 0].sum() + share * (nbytes[:, 2] - nbytes[:, 0]).sum()
        assert wanted - 600 <= spent <= wanted  # within one step of one matrix


def test_what_halves_lose_is_what_their_maps_cost_more() -> None:
    """Against a plain loop."""
    cost, nbytes = problem(60, 7)
    rng = np.random.default_rng(8)
    halves = np.stack([cost * np.exp(rng.normal(size=cost.shape) * 0.5) for _ in range(2)])
    lost = []
    for share in BUDGETS:
        price = price_of(cost, nbytes, share)
        for half in halves:
            more = whole = 0.0
            for i in range(60):
                paid = [cost[i, f] + price * nbytes[i, f] for f in range(3)]
                asked = [half[i, f] + price * nbytes[i, f] for f in range(3)]
                best, chosen = paid.index(min(paid)), asked.index(min(asked))
                more, whole = more + paid[chosen] - paid[best], whole + cost[i, best]
            lost.append(more / whole)
    assert regret(cost, halves, nbytes) == pytest.approx(sum(lost) / len(lost), rel=1e-9) and min(lost) > 0


def test_agreeing_halves_lose_nothing_and_noise_loses_more() -> None:
    cost, nbytes = problem(300, 1)
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(2, *cost.shape))
    lost = [regret(cost, cost * np.exp(sigma * noise), nbytes) for sigma in (0.0, 0.05, 0.3, 1.0)]
    assert lost[0] == 0 and lost == sorted(lost) and lost[-1] > 0.05
    assert regret(0 * cost, np.stack([0 * cost] * 2), nbytes) == 0
