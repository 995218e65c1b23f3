"""Products by AMX against float64, on fresh inputs and odd shapes; torch serves where there is no AMX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mopeq.kernels import build, dense
from mopeq.walk.shelf import Luggage, Shelf

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
            dense.run(a, b, found, add=True)
            assert ((found - sums.double() - true).abs() <= 2**-15 * terms + 1e-6).all()
            assert ((dense.linear(a, b.T) - true).abs() <= 2**-15 * terms + 1e-7).all()


@pytest.mark.parametrize("tokens", [1, 40, 700])
@pytest.mark.parametrize("n", [1, 31, 64, 100, 600])
def test_moments_are_whole_once_mirrored(n: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = fresh((tokens, n), (tokens, 1))
    for least in (0, 1 << 62):  # by AMX, where it is here, and by torch
        monkeypatch.setattr(dense, "SMALL", least)
        sums = torch.eye(n).repeat(2, 1, 1)
        dense.add_moments(sums[1], x * weight, x)
        dense.mirror(sums)
        true = torch.eye(n).double() + (x * weight).double().T @ x.double()
        terms = 1 + (x * weight).double().abs().T @ x.double().abs()
        assert torch.equal(sums[0], torch.eye(n)) and torch.equal(sums, sums.mT)
        assert ((sums[1] - true).abs() <= 2**-15 * terms).all()


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


def test_a_product_may_be_changed_in_place(amx: None) -> None:
    """As Llama 4's text model does with its shared expert's, with gradients on."""
    x, w, more = fresh((9, 40), (30, 40), (9, 30))
    for shape in ((9, 40), (3, 3, 40)):
        product = dense.linear(x.view(shape).requires_grad_(True), w)
        assert not product._is_view()
        with torch.no_grad():
            kept = dense.linear(x.view(shape), w)
        for each in (product, kept):
            each.add_(more.view_as(each))
            assert torch.allclose(each.reshape(9, 30), x @ w.T + more, atol=1e-3)


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

    def counted(a_MK: Tensor, b_KN: Tensor, c_MN: Tensor, add: bool) -> None:
        calls.append(1)
        run(a_MK, b_KN, c_MN, add)

    monkeypatch.setattr(dense, "run", counted)
    with dense.quick_linears():
        y = layer(x)
    assert len(calls) == 1 and y.shape == (2, 3, 30)
    assert torch.allclose(y, layer(x), atol=1e-4) and len(calls) == 1


def test_blocks_nest_and_leave_what_others_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with dense.quick_linears():
        with pytest.raises(ZeroDivisionError), dense.quick_linears():
            raise ZeroDivisionError
        assert functional.linear is dense.linear
    assert functional.linear is dense.torch_linear
    theirs = lambda *given: dense.torch_linear(*given)  # noqa: E731
    monkeypatch.setattr(functional, "linear", theirs)
    with dense.quick_linears():
        assert functional.linear is theirs
    assert functional.linear is theirs


def test_blocks_that_overlap_leave_torchs() -> None:
    one, other = dense.quick_linears(), dense.quick_linears()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert functional.linear is dense.torch_linear


class Own(Tensor):
    """A kind of tensor of somebody's own."""


def minus() -> Tensor:
    """A view that stands for its memory's negative."""
    (x,) = fresh((4, 8))
    found: Tensor = torch.complex(x, x).conj().imag
    assert found.is_neg()
    return found


@pytest.mark.parametrize(
    "given",
    [
        lambda: (minus(), fresh((6, 8))[0]),
        lambda: (fresh((4, 8))[0], fresh((6, 8))[0].to_sparse()),
        lambda: (fresh((4, 8))[0], fresh((1, 8))[0][0]),
        lambda: (fresh((4, 8))[0].as_subclass(Own), fresh((6, 8))[0]),
        lambda: (fresh((4, 8))[0].bfloat16(), fresh((6, 8))[0].bfloat16()),
        lambda: (fresh((4, 8))[0][0], fresh((6, 8))[0]),
    ],
    ids=["negative view", "sparse", "a vector as weights", "subclass", "bf16", "a vector as input"],
)
def test_what_is_not_plain_is_torchs(amx: None, given: Callable[[], tuple[Tensor, Tensor]]) -> None:
    x, w = given()
    found, wanted = dense.linear(x, w), dense.torch_linear(x, w)
    assert type(found) is type(wanted) and torch.equal(found, wanted)


def test_shapes_that_do_not_fit_are_refused(amx: None) -> None:
    x, w = fresh((4, 7), (6, 8))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        dense.linear(x, w)


def test_autocast_is_torchs(amx: None) -> None:
    x, w = fresh((4, 8), (6, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert dense.linear(x, w).dtype == torch.bfloat16


def test_compiled_models_see_torchs(amx: None) -> None:
    x, w = fresh((4, 8), (6, 8))
    product = torch.compile(lambda x: functional.linear(x, w), backend="eager", fullgraph=True)
    with dense.quick_linears():
        assert torch.equal(product(x), dense.torch_linear(x, w))


def test_views_of_fused_weights(amx: None) -> None:
    fused, x = fresh((12, 20), (9, 16))
    w, part = fused[2:8, 5:13], x[:, 3:11]
    assert torch.allclose(dense.linear(part, w), dense.torch_linear(part, w), atol=1e-4)
    row = part[:1].expand(5, 8)
    assert torch.allclose(dense.linear(row, w), dense.torch_linear(row, w), atol=1e-4)


def test_weights_are_let_go_after_the_way_back(amx: None) -> None:
    x, w = fresh((4, 8), (6, 8))
    loss = dense.linear(x.requires_grad_(True), w).sum()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and torch.allclose(x.grad, 2 * w.sum(0).expand(4, 8), atol=1e-4)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_what_a_batch_made_can_wait_on_disk(amx: None, tmp_path: Path) -> None:
    x, w = fresh((128, 64), (256, 64))
    luggage = Luggage(Shelf(tmp_path, memory_bytes=0))
    with dense.quick_linears():
        with luggage.watching():
            held = functional.linear(x, w)
        assert torch.equal(held, wanted := dense.linear(x, w))
        luggage.lay_down()
        assert held.untyped_storage().nbytes() == 0
        luggage.pick_up()
        assert torch.equal(held, wanted)
