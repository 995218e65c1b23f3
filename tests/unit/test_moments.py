"""Moments of routed inputs: every expert leans on its layer by a fixed number of tokens."""

from __future__ import annotations

import torch

from mopeq.sense.moments import PRIOR_TOKENS, Moments


def test_experts_lean_on_their_layer() -> None:
    x, h = torch.rand(3, 4, 4), torch.rand(3, 2, 2)
    x[1], h[1] = 0, 0
    seen = Moments(x.clone(), h.clone(), torch.tensor([30, 0, 70]))
    assert seen.starved == [1]
    seen.fill_starved()
    assert seen.starved == [1]
    for got, given in ((seen.x, x), (seen.h, h)):
        mean = given.sum(0) / 100
        assert torch.allclose(got, given + PRIOR_TOKENS * mean)
        assert torch.allclose(got[1], PRIOR_TOKENS * mean)


def test_a_layer_without_tokens_stays_without() -> None:
    seen = Moments(torch.zeros(2, 4, 4), torch.zeros(2, 2, 2), torch.zeros(2, dtype=torch.int64))
    seen.fill_starved()
    assert not bool(seen.x.any()) and seen.starved == [0, 1]
