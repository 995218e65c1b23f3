"""Round to nearest: scales rounded before codes are chosen, errors bounded, awkward groups, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mopeq.errors import BadInput
from mopeq.nouns import Format
from mopeq.quant.rtn import SMALLEST, quantize
from mopeq.tensors import per_input

WIDTHS = range(1, 9)


def random_weights(*shape: int, seed: int = 0, spread: float = 0.05) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def errors_in_steps(w: torch.Tensor, q) -> torch.Tensor:
    """|w - dequantized| in units of each weight's scale, in float64."""
    scale = per_input(q.scales.double(), q.format.group_size, w.shape[-1])
    return (w.double() - q.dequantize(torch.float64)).abs() / scale


def naive(w: np.ndarray, fmt: Format) -> np.ndarray:
    """One row, group after group, in float64: what the format's paragraph says (asymmetric)."""
    out = np.empty_like(w)
    for at in range(0, len(w), fmt.group_size):
        group = w[at : at + fmt.group_size]
        low, high = min(group.min(), 0.0), max(group.max(), 0.0)
        scale = float(np.float16((high - low) / (2**fmt.bits - 1)))
        zero = round(-low / scale)
        codes = np.clip(np.rint(group / scale) + zero, 0, 2**fmt.bits - 1)
        out[at : at + fmt.group_size] = (codes - zero) * scale
    return out


@pytest.mark.parametrize("bits", WIDTHS)
def test_agrees_with_a_naive_loop(bits: int) -> None:
    fmt = Format(bits, 24)
    w = random_weights(6, 100, seed=bits)
    q = quantize(w, fmt)
    wanted = np.stack([naive(row, fmt) for row in w.double().numpy()])
    away = np.abs(q.dequantize(torch.float64).numpy() - wanted)
    scale = per_input(q.scales.double(), 24, 100).numpy()
    steps = w.double().numpy() / scale
    tie = np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 1e-4  # float32 and float64 may part there
    assert np.all(away[~tie] == 0) and tie.mean() < 0.01


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", ["a", "s"])
@pytest.mark.parametrize("spread", [1e-2, 1.0, 1e3])
def test_error_is_at_most_half_a_step(bits: int, scheme: str, spread: float) -> None:
    """Plus what fp16's rounding of the scale (2^-11) moves the range's end by; one-bit symmetric has no positive
    code, so only its negative side is bounded."""
    fmt = Format(bits, 32, scheme)
    w = random_weights(16, 100, seed=bits, spread=spread)
    steps = errors_in_steps(w, quantize(w, fmt))
    if fmt == Format(1, 32, "s"):
        steps = steps[w < 0]
    assert float(steps.max()) <= 0.5 + 2**bits * 2.0**-11 + 1e-3


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", ["a", "s"])
@pytest.mark.parametrize("spread", [1e-8, 1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4])
def test_tiny_weights_keep_the_bound(bits: int, scheme: str, spread: float) -> None:
    """Where scales are fp16 subnormals, rounding them down would cut the range short by up to a half."""
    fmt = Format(bits, 32, scheme)
    w = random_weights(16, 96, seed=bits, spread=spread)
    q = quantize(w, fmt)
    assert bool((q.scales > 0).all())
    steps = errors_in_steps(w, q)
    if fmt == Format(1, 32, "s"):
        steps = steps[w < 0]
    assert float(steps.max()) <= 0.5 + 2**bits * 2.0**-11 + 1e-3


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_zero_groups_stay_zero(bits: int, scheme: str) -> None:
    w = random_weights(4, 70)
    w[1], w[2, 32:64] = 0, 0
    q = quantize(w, Format(bits, 32, scheme))
    back = q.dequantize()
    assert bool((back[1] == 0).all()) and bool((back[2, 32:64] == 0).all())
    assert bool(torch.isfinite(back).all()) and bool((q.scales > 0).all())
    assert float(q.scales[1, 0]) == SMALLEST


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_signed_groups_include_zero(bits: int) -> None:
    """Every group's range includes 0, so that a zero point fits: positive groups have zero 0, negative ones the
    largest code."""
    fmt = Format(bits, 16)
    w = random_weights(8, 64).abs() + 1.0
    up, down = quantize(w, fmt), quantize(-w, fmt)
    assert up.zeros is not None and down.zeros is not None
    assert bool((up.zeros == 0).all()) and bool((down.zeros == fmt.max_code).all())
    for sign, q in ((1, up), (-1, down)):
        assert float(errors_in_steps(sign * w, q).max()) <= 0.5 + 2**bits * 2.0**-11 + 1e-3


@pytest.mark.parametrize("scheme", ["a", "s"])
def test_scales_are_rounded_before_codes_are_chosen(scheme: str) -> None:
    """Codes chosen with the unrounded scale miss the nearest grid point of the stored scale far from zero."""
    fmt = Format(8, 64, scheme)
    w = random_weights(64, 64, seed=3)
    q = quantize(w, fmt)
    zero = 2.0 ** (fmt.bits - 1) if q.zeros is None else per_input(q.zeros.double(), 64, 64)
    grid = (w.double() / per_input(q.scales.double(), 64, 64) + zero).clamp(0, fmt.max_code)
    assert float((grid - q.codes.double()).abs().max()) <= 0.5 + 1e-4
    groups = w.view(64, 1, 64)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    exact = (high - low) / fmt.max_code if scheme == "a" else torch.maximum(-low / 2**7, high / (2**7 - 1))
    assert torch.equal(q.scales, exact.half()) and not torch.equal(q.scales.float(), exact)


def test_codes_and_zeros_fit_their_width() -> None:
    for bits in WIDTHS:
        for scheme in "as":
            fmt = Format(bits, 20, scheme)
            q = quantize(random_weights(9, 70, seed=bits, spread=3.0), fmt)
            assert q.codes.dtype == torch.uint8 and int(q.codes.max()) <= fmt.max_code
            if scheme == "s":
                assert q.zeros is None
            else:
                assert q.zeros is not None and q.zeros.dtype == torch.uint8 and int(q.zeros.max()) <= fmt.max_code
            assert q.scales.dtype == torch.float16 and q.scales.shape == (9, 4)


@pytest.mark.parametrize("scheme", ["a", "s"])
def test_weights_beyond_fp16_scales_are_refused(scheme: str) -> None:
    w = random_weights(4, 64)
    w[2, 3] = 1e9
    with pytest.raises(BadInput, match="beyond fp16") as refused:
        quantize(w, Format(4, 64, scheme))
    assert refused.value.hint
    w[2, 3] = -1e38
    with pytest.raises(BadInput, match="beyond fp16"):
        quantize(w, Format(8, 64, scheme))
    w[2, 3] = 60000 * 15 if scheme == "a" else 60000 * 7
    assert bool(torch.isfinite(quantize(w, Format(4, 64, scheme)).dequantize()).all())


@pytest.mark.parametrize("scheme", ["a", "s"])
def test_same_weights_same_bytes(scheme: str) -> None:
    """In a batch or alone, in any memory order, from any source dtype that holds the same values."""
    fmt = Format(3, 32, scheme)
    w = random_weights(5, 24, 72).bfloat16()
    first = quantize(w, fmt).pack()
    assert all(torch.equal(v, quantize(w.clone(), fmt).pack()[k]) for k, v in first.items())
    turned = w.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(torch.equal(v, quantize(turned, fmt).pack()[k]) for k, v in first.items())
    assert all(torch.equal(v, quantize(w.float(), fmt).pack()[k]) for k, v in first.items())
    for e in range(5):
        assert all(torch.equal(v[e], quantize(w[e], fmt).pack()[k]) for k, v in first.items())


def test_the_last_group_is_ruled_by_its_own_weights() -> None:
    w = random_weights(3, 70)
    w[:, 64:] *= 1e-3
    whole, tail = quantize(w, Format(4, 64)), quantize(w[:, 64:], Format(4, 64))
    assert torch.equal(whole.scales[:, 1:], tail.scales) and torch.equal(whole.codes[:, 64:], tail.codes)


def test_wider_is_closer() -> None:
    w = random_weights(32, 128)
    errors = [float((quantize(w, Format(bits, 64)).dequantize() - w).square().mean()) for bits in WIDTHS]
    assert errors == sorted(errors, reverse=True) and errors[0] > 3 * errors[1] > 9 * errors[2]
