"""Products by AMX against float64, on fresh inputs and odd shapes; torch serves where there is no AMX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mopeq.kernels import build, dense

SHAPES = [(1, 1, 1), (3, 5, 70), (33, 31, 16), (64, 64, 64), (65, 63, 33), (7, 130, 257), (600, 96, 40), (40, 1100, 65)]


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    if build.dense() is None:
        pytest.skip("there is no AMX here")
    monkeypatch.setattr(dense, "SMALL", 0)


def fresh(*shapes: tuple[int, int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(int(np.random.default_rng().integers(1 << 30)))
    return [torch.randn(*shape, generator=draw) for shape in shapes]


def turned(t: Tensor) -> Tensor:
    """The same numbers, the other way round in memory."""
    return t.T.contiguous().T


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16 weights"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(amx: None, shape: tuple[int, int, int], half: bool) -> None:
    m, k, n = shape
    x, w, sums = fresh((m, k), (k, n), (m, n))
    if half:
        w = w.bfloat16().float()
    true = x.double() @ w.double()
    terms = x.double().abs() @ w.double().abs()
    for a in (x, turned(x)):
        for b in (w, turned(w)):
            found = sums.clone()
            dense.add_product(found, a, b)
            assert ((found - sums.double() - true).abs() <= 2**-15 * terms + 1e-6).all()
            assert ((dense.linear(a, b.T) - true).abs() <= 2**-15 * terms + 1e-7).all()


def test_large_and_small_numbers_keep_their_precision(amx: None) -> None:
    x, w = fresh((40, 70), (50, 70))
    x *= torch.logspace(-15, 15, 40)[:, None]
    w *= torch.logspace(-15, 15, 50)[:, None]
    true = x.double() @ w.double().T
    terms = x.double().abs() @ w.double().abs().T
    assert ((dense.linear(x, w) - true).abs() <= 2**-15 * terms).all()


def test_the_same_bits_with_any_threads(amx: None) -> None:
    x, w = fresh((70, 200), (333, 200))
    threads, one = torch.get_num_threads(), dense.linear(x, w)
    try:
        torch.set_num_threads(3)
        assert torch.equal(dense.linear(x, w), one)
    finally:
        torch.set_num_threads(threads)


def test_differentiable_twice(amx: None) -> None:
    x, w, v = fresh((9, 40), (30, 40), (9, 40))

    def curvature(product: object, t: Tensor, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        t = t.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(product(t, m).pow(3).sum(), t, create_graph=True)  # type: ignore[operator]
        (second,) = torch.autograd.grad((gradient * u).sum(), t)
        return gradient.detach(), second

    true = curvature(torch.nn.functional.linear, x.double(), v.double(), w.double())
    for found, wanted in zip(curvature(dense.linear, x, v, w), true, strict=True):
        assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_weights_with_gradients_and_other_types_go_to_torch(amx: None) -> None:
    x, w = fresh((4, 8), (6, 8))
    w.requires_grad_(True)
    dense.linear(x, w).sum().backward()
    assert w.grad is not None and torch.allclose(w.grad, x.sum(0).expand(6, 8))
    y = dense.linear(x.double(), w.detach().double())
    assert y.dtype == torch.float64 and torch.equal(y, torch.nn.functional.linear(x.double(), w.detach().double()))


def test_linear_layers_of_a_model_are_quick_within_the_block_alone(amx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(40, 30).requires_grad_(False)
    (x,) = fresh((2 * 3, 40))
    x = x.view(2, 3, 40)
    calls: list[int] = []
    run = dense.run
    monkeypatch.setattr(dense, "run", lambda *given, **named: (calls.append(1), run(*given, **named)))
    with dense.quick_linears():
        y = layer(x)
    assert len(calls) == 1 and y.shape == (2, 3, 30)
    assert torch.allclose(y, layer(x), atol=1e-4) and len(calls) == 1
