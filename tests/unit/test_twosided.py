"""Descent on tr(G D H D^T): never above gptq's, down to a plain search's least on small cases, odd shapes, no data."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from quant_reference import check_form, moments, odd_cases, weights
from torch import Tensor

from mopeq.nouns import Format
from mopeq.quant import gptq, twosided
from mopeq.quant.descent import damped, of_mean_one
from mopeq.tensors import QWeight, per_input


def losses(w: Tensor, q: QWeight, m: Tensor, g: Tensor) -> Tensor:
    """tr(G D H D^T) [E] of the damped moments, in float64."""
    away = q.dequantize(torch.float64) - w.double()
    h, g = (damped(*of_mean_one(t)).double() for t in (m, g))
    return torch.einsum("enm,emc,ecd,end->e", g, away, h, away)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_the_loss_is_never_above_gptqs(bits: int, scheme: str) -> None:
    fmt = Format(bits, 32, scheme)
    ours, theirs = 0.0, 0.0
    for shape, w, m in odd_cases(bits):
        g = moments(shape[0], shape[1], seed=bits + 1, tokens=3 * shape[1])
        q = twosided.quantize(w, fmt, moments=m, gradients=g)
        check_form(q, w, fmt)
        ours_E, theirs_E = losses(w, q, m, g), losses(w, gptq.quantize(w, fmt, moments=m), m, g)
        assert bool((ours_E <= theirs_E * (1 + 1e-4)).all()), (shape, ours_E / theirs_E)
        ours, theirs = ours + float(ours_E.sum()), theirs + float(theirs_E.sum())
    assert ours < 0.97 * theirs


def test_no_code_alone_does_better_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One output at a time the bound is exact, so that every code ends at its best with all others held."""
    monkeypatch.setattr(twosided, "OUTPUTS", 1)
    monkeypatch.setattr(twosided, "ROUNDS", 60)
    fmt = Format(2, 8)
    w, m, g = weights((2, 5, 16)), moments(2, 16), moments(2, 5, seed=1)
    q = twosided.quantize(w, fmt, moments=m, gradients=g)
    assert q.zeros is not None
    h, g = (damped(*of_mean_one(t)).double() for t in (m, g))
    pull = g @ (q.dequantize(torch.float64) - w.double()) @ h
    step = per_input(q.scales.double(), 8, 16)
    curve = g.diagonal(dim1=1, dim2=2)[:, :, None] * h.diagonal(dim1=1, dim2=2)[:, None]
    for move in (-1, 1):
        allowed = (q.codes.int() + move >= 0) & (q.codes.int() + move <= 3)
        gain = 2 * move * step * pull + curve * step.square()
        assert float(gain[allowed].min()) > -1e-3 * float((curve * step.square()).mean())


def test_close_to_the_best_of_all_codes() -> None:
    """2 outputs x 3 inputs at 1 bit: with the scales that were chosen, no codes are much better."""
    fmt = Format(1, 4)
    close = []
    for seed in range(12):
        w, m, g = weights((1, 2, 3), seed=seed), moments(1, 3, seed=seed), moments(1, 2, seed=seed + 50)
        q = twosided.quantize(w, fmt, moments=m, gradients=g)
        best = np.inf
        for codes in product((0, 1), repeat=6):
            other = QWeight(torch.tensor(codes, dtype=torch.uint8).view(1, 2, 3), q.scales, q.zeros, fmt)
            best = min(best, float(losses(w, other, m, g)))
        close.append(float(losses(w, q, m, g)) / best)
    assert np.median(close) < 1.01 and max(close) < 2


def test_outputs_that_nothing_couples_are_gptqs() -> None:
    """Where G is the identity the target does not move, and what more sweeps of gptq find is found."""
    fmt = Format(3, 16)
    w, m = weights((3, 12, 48)), moments(3, 48)
    g = torch.eye(12).expand(3, 12, 12)
    more = gptq.quantize(w, fmt, moments=m, sweeps=gptq.SWEEPS + twosided.ROUNDS)
    assert torch.allclose(losses(w, twosided.quantize(w, fmt, moments=m, gradients=g), m, g), losses(w, more, m, g))


def test_without_gradients_or_with_none_that_help() -> None:
    fmt = Format(2, 32)
    w, m = weights((2, 6, 40)), moments(2, 40)
    plain = gptq.quantize(w, fmt, moments=m)
    assert torch.equal(twosided.quantize(w, fmt, moments=m).codes, plain.codes)
    for g in (torch.zeros(2, 6, 6), torch.full((2, 6, 6), torch.nan)):
        check_form(twosided.quantize(w, fmt, moments=m, gradients=g), w, fmt)
