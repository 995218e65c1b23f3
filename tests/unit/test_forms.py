"""What candidates change in the loss: by torch and compiled, against float64, on fresh inputs and odd shapes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from mopeq.kernels import build
from mopeq.kernels.build import BEST
from mopeq.nouns import Format
from mopeq.quant import rtn
from mopeq.sense import forms
from mopeq.tensors import QWeight

SETS = {"torch": 0, "avx512": 2, "amx": 3}


@pytest.fixture(params=SETS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    lib = build.forms()
    if request.param == "torch":
        monkeypatch.setattr(forms, "usable", lambda *tensors: False)
    elif lib is None or lib.mopeq_forms_set(SETS[request.param]) < SETS[request.param]:
        pytest.skip(f"forms.c cannot be built, or {request.param} is not here")
    yield request.param
    if lib is not None:
        lib.mopeq_forms_set(BEST)


def fresh(tokens: int, out: int, n: int) -> tuple[list[QWeight], Tensor, Tensor, Tensor]:
    rng = np.random.default_rng()
    draw = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
    w, x, g = (torch.randn(*shape, generator=draw) for shape in ((out, n), (tokens, n), (tokens, out)))
    formats = [
        Format(bits, size, scheme) for bits, size, scheme in ((1, 16, "a"), (2, 64, "a"), (3, 32, "s"), (8, 128, "a"))
    ]
    return [rtn.quantize(w[None], fmt)[0] for fmt in formats], w, x, g


def exact(candidates: list[QWeight], w: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """g^T dW x [S, F] in float64."""
    aways = [q.dequantize(torch.float64) - w.double() for q in candidates]
    return torch.stack([((g.double() @ away) * x.double()).sum(1) for away in aways], 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 16), (64, 64, 64), (65, 63, 33), (7, 130, 257), (200, 65, 96)])
def test_agrees_with_float64(shape: tuple[int, int, int], path: str) -> None:
    candidates, w, x, g = fresh(*shape)
    along = exact(candidates, w, x, g)
    found = forms.loss_increases(candidates, w, x, None, 1, g)
    assert found.dtype == torch.float64
    assert torch.allclose(found, 0.5 * along.square().sum(0), rtol=2e-4 if path == "amx" else 2e-5)
    row_S = torch.arange(len(x)) % 3
    sums = torch.zeros(3, along.shape[1], dtype=torch.float64).index_add_(0, row_S, along)
    assert torch.allclose(forms.loss_increases(candidates, w, x, row_S, 3, g), 0.5 * sums.square().sum(0), rtol=1e-3)


def test_the_same_bits_with_any_threads_and_from_views(path: str) -> None:
    if path == "torch":
        pytest.skip("BLAS's sums do depend on threads")
    candidates, w, x, g = fresh(70, 200, 130)
    threads, one = torch.get_num_threads(), forms.along_compiled(candidates, w, x, g)
    views = [QWeight(q.codes.T.contiguous().T, q.scales, q.zeros, q.format) for q in candidates]
    try:
        torch.set_num_threads(3)
        other = forms.along_compiled(views, w.T.contiguous().T, x.T.contiguous().T, g.T.contiguous().T)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, other)


def test_no_tokens(path: str) -> None:
    candidates, w, x, g = fresh(0, 40, 48)
    assert torch.equal(forms.loss_increases(candidates, w, x, None, 1, g), torch.zeros(4, dtype=torch.float64))
