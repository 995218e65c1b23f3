"""SignRound on second moments: never worse than rtn, on odd shapes and inputs; each matrix keeps its best."""

from __future__ import annotations

import pytest
import torch
from quant_reference import WIDTHS, check_form, moments, odd_cases, output_errors, weights

from mopeq.errors import BadInput
from mopeq.nouns import Format
from mopeq.quant import descent, rtn, signround


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_outputs_are_never_further_than_rtns(bits: int, scheme: str) -> None:
    fmt = Format(bits, 32, scheme)
    ours, theirs = 0.0, 0.0
    for shape, w, m in odd_cases(bits):
        q = signround.quantize(w, fmt, moments=m)
        check_form(q, w, fmt)
        h = descent.factored(m, 32).h  # what it minimises: with damping
        ours_E, theirs_E = output_errors(w, q, h), output_errors(w, rtn.quantize(w, fmt), h)
        assert bool((ours_E <= theirs_E * (1 + 1e-5)).all())
        if shape[2] > 1:
            ours, theirs = ours + float(ours_E.sum()), theirs + float(theirs_E.sum())
    assert ours < (0.85 if bits <= 4 else 0.99) * theirs


@pytest.mark.parametrize("scheme", ["a", "s"])
def test_odd_weights_and_moments(scheme: str) -> None:
    fmt, n = Format(2, 32, scheme), 80
    base = weights((1, 6, n), seed=3)
    outlier = base.clone()
    outlier[..., 7] *= 100
    m = moments(1, n, seed=3)
    dead = m.clone()
    dead[:, :9] = dead[:, :, :9] = 0
    for w in (base * 0, torch.full_like(base, 0.3), -base.abs(), outlier, base * 1e4, base * 1e-5):
        for mm in (m, m * 0, moments(1, n, seed=4, tokens=1), dead):
            q = signround.quantize(w, fmt, moments=mm)
            check_form(q, w, fmt)
            h = descent.factored(mm, 32).h
            limit = output_errors(w, rtn.quantize(w, fmt), h)
            assert bool((output_errors(w, q, h) <= limit * (1 + 1e-5)).all())
    assert torch.equal(signround.quantize(base * 0, fmt, moments=m).dequantize(), base * 0)
    assert torch.equal(signround.quantize(base, fmt).codes, rtn.quantize(base, fmt).codes)


def test_best_keeps_each_matrix_its_own() -> None:
    w = torch.ones(2, 4, 3)
    h = torch.eye(4).repeat(2, 1, 1)
    ones, zero = torch.ones(2, 1, 3), torch.zeros(2, 1, 3)
    level = torch.zeros(2, 4, 3)
    best = signround.Best(level, ones, zero, w, h, 4)
    nearer = level.clone()
    nearer[1] = 1
    pull = best.see(nearer, ones, zero)
    assert torch.equal(best.level, nearer) and torch.equal(pull, nearer - w)
    best.see(torch.full_like(level, 3.0), ones, zero)
    assert torch.equal(best.level, nearer) and best.least_E.tolist() == [12.0, 0.0]


def test_group_sums_with_a_short_last_group() -> None:
    t = torch.arange(14.0).view(1, 7, 2)
    assert signround.group_sum(t, 3).tolist() == [[[6.0, 9.0], [24.0, 27.0], [12.0, 13.0]]]
    assert signround.group_sum(t, 9).tolist() == [[[42.0, 49.0]]]


def test_same_input_same_bytes_and_beyond_fp16_refused() -> None:
    w, m = weights((3, 8, 70)), moments(3, 70)
    first, second = (signround.quantize(w, Format(3, 32), moments=m).pack() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    w[1, 2, 3] = 1e9
    with pytest.raises(BadInput, match="beyond fp16"):
        signround.quantize(w, Format(2, 32), moments=m)
