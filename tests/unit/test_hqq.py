"""HQQ: its own measure never worse than rtn's, outliers forgiven, odd shapes and weights."""

from __future__ import annotations

import pytest
import torch
from quant_reference import SHAPES, WIDTHS, check_form, weights

from mopeq.errors import BadInput
from mopeq.nouns import Format
from mopeq.quant import hqq, rtn
from mopeq.tensors import QWeight


def measure(w: torch.Tensor, q: QWeight) -> torch.Tensor:
    """sum |W - Q|^p of each group [..., out, G], in float64."""
    away = (q.dequantize(torch.float64) - w.double()).abs().pow(hqq.NORM)
    return rtn.grouped(away, q.format.group_size).sum(-1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_no_group_is_further_off_than_rtns(bits: int, scheme: str) -> None:
    fmt = Format(bits, 32, scheme)
    for i, shape in enumerate(SHAPES):
        w = weights(shape, seed=bits + i)
        q = hqq.quantize(w, fmt)
        check_form(q, w, fmt)
        # float32 and float64 part where a weight lies between two codes
        assert bool((measure(w, q) <= measure(w, rtn.quantize(w, fmt)) * (1 + 1e-3) + 1e-6).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_an_outlier_stretches_the_range_less(bits: int) -> None:
    fmt = Format(bits, 64)
    w = weights((4, 16, 128))
    w[..., 5] *= 20
    q, plain = hqq.quantize(w, fmt), rtn.quantize(w, fmt)
    rest = torch.arange(128) != 5
    ours, theirs = ((x.dequantize() - w)[..., rest].square().mean() for x in (q, plain))
    assert float(ours) < 0.95 * float(theirs)


@pytest.mark.parametrize("scheme", ["a", "s"])
def test_odd_weights(scheme: str) -> None:
    base = weights((2, 6, 70), seed=3)
    for bits in (1, 2, 8):
        fmt = Format(bits, 32, scheme)
        for w in (base * 0, torch.full_like(base, 0.3), base.abs() + 0.1, -base.abs(), base * 1e4, base * 1e-6):
            q = hqq.quantize(w, fmt)
            check_form(q, w, fmt)
            assert bool((measure(w, q) <= measure(w, rtn.quantize(w, fmt)) * (1 + 1e-3) + 1e-6).all())
        assert torch.equal(hqq.quantize(base * 0, fmt).dequantize(), base * 0)
    base[0, 1, 2] = 1e9
    with pytest.raises(BadInput, match="beyond fp16"):
        hqq.quantize(base, Format(2, 32, scheme))


def test_same_bytes_alone_and_in_a_batch() -> None:
    w = weights((3, 8, 70))
    whole = hqq.quantize(w, Format(3, 32)).pack()
    for e in range(3):
        assert all(torch.equal(v[e], hqq.quantize(w[e], Format(3, 32)).pack()[k]) for k, v in whole.items())


def test_shrinking_minimises_what_it_says() -> None:
    """Near the true proximal point of |R|^p, found on a fine grid: zero for small errors, almost all of large ones."""
    grid = torch.linspace(-6, 6, 120001, dtype=torch.float64)
    for error in (0.2, 0.9, 3.0, -4.0):
        exact = grid[(grid.abs().pow(hqq.NORM) + hqq.BETA / 2 * (grid - error).square()).argmin()]
        assert abs(float(hqq.shrink(torch.tensor([error]), hqq.BETA)) - float(exact)) < 0.3
    assert float(hqq.shrink(torch.tensor([0.0]), hqq.BETA)) == 0.0
