"""What is asked of all weights of a tensor, in C against the obvious in float64."""

from __future__ import annotations

import math
import secrets

import pytest
import torch
from torch import Tensor

from mopeq.errors import BadInput
from mopeq.kernels import build, extent
from mopeq.stream import refuse_sick

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def drawn(count: int, dtype: torch.dtype) -> Tensor:
    """Numbers of very different sizes, down to subnormal ones."""
    generator = torch.Generator().manual_seed(secrets.randbits(32))
    size = 2.0 ** torch.randint(-20, 4, (count,), generator=generator)
    w = (torch.randn(count, generator=generator) * size).to(dtype)
    w[:: max(1, count // 3)] *= 2.0**-120 if dtype != torch.float16 else 2.0**-10
    return w


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_c", [True, False])
def test_squares_and_largest_are_those_of_float64(dtype: torch.dtype, in_c: bool, monkeypatch: pytest.MonkeyPatch):
    if not in_c:
        monkeypatch.setattr(extent, "rounding", lambda: None)
    elif build.rounding() is None:
        pytest.skip("no C compiler")
    for count in (0, 1, 2, 15, 16, 17, 31, 33, 1000, 4097):
        w = drawn(count, dtype)
        exact = math.fsum(x * x for x in w.double().tolist())
        assert extent.squares(w) == pytest.approx(exact, rel=1e-13, abs=0)
        assert extent.largest(w) == max((abs(x) for x in w.double().tolist()), default=0.0)
    apart = drawn(600, dtype).view(20, 30)[:, 3:17]
    assert extent.largest(apart) == float(apart.double().abs().max())
    assert extent.squares(apart) == pytest.approx(float(apart.double().square().sum()), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sick_weight_is_found_anywhere_and_named(dtype: torch.dtype):
    for kind, value in (("NaN", math.nan), ("NaN", -math.nan), ("infinite", math.inf), ("infinite", -math.inf)):
        for count in (1, 16, 37, 515):
            w = drawn(count, dtype)
            assert refuse_sick("model.w", w) is w
            w[secrets.randbelow(count)] = value
            with pytest.raises(BadInput, match=f"model.w holds {kind} weights"):
                refuse_sick("model.w", w)
            assert not math.isfinite(extent.squares(w))


def test_a_nan_beside_an_infinity_is_a_nan():
    for dtype in DTYPES:
        w = drawn(100, dtype)
        w[3], w[70] = math.inf, math.nan
        with pytest.raises(BadInput, match="NaN"):
            refuse_sick("w", w)


def test_a_weight_too_wide_is_told_by_its_size():
    w = torch.tensor([1.0, -3e7, 2e7])
    assert refuse_sick("w", w) is w
    with pytest.raises(BadInput, match="a weight of 3e\\+07, which needs a scale beyond fp16"):
        refuse_sick("w", w, 16e6)
    whole = torch.tensor([1, 2])
    assert refuse_sick("w", whole) is whole
