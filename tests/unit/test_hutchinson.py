"""What Hutchinson's traces are made of: signs that belong to a place, a loss with thrifty derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import cross_entropy

from mopeq.sense.hutchinson import NO_TARGET, ROWS, MeanLoss, Signed, signs


def test_signs_belong_to_their_place() -> None:
    one, other = signs((3, 0, 1, 5, 2, 0), 37, 45, "cpu"), signs((3, 0, 1, 5, 3, 0), 37, 45, "cpu")
    assert torch.equal(one, signs((3, 0, 1, 5, 2, 0), 37, 45, "cpu")) and torch.equal(one.abs(), torch.ones(37, 45))
    for product in (one, other, one * other, one[1:] * one[:-1]):  # five standard deviations
        assert abs(product.sum().item()) < 5 * product.numel() ** 0.5
    assert one[0, :16].tolist() == [-1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, -1, 1, -1, -1, 1], "on every machine"


def test_a_signed_product_has_second_derivatives() -> None:
    x, u = (torch.randn(4, n, dtype=torch.float64, requires_grad=True) for n in (6, 5))
    v = signs((1,), 5, 6, "cpu").double()
    assert torch.equal(Signed.apply(x, lambda: v, False), x @ v.T)
    assert torch.autograd.gradgradcheck(lambda x: Signed.apply(x, lambda: v, False).sin(), x)
    assert torch.autograd.gradcheck(lambda u: Signed.apply(u, lambda: v, True), u)


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 7])
def test_the_mean_loss_has_torchs_derivatives(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 11, generator=generator, dtype=torch.float64).requires_grad_()
    v = torch.randn(rows, 11, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 11, (rows,), generator=generator)
    target[1::3] = NO_TARGET

    def derivatives(loss: Tensor) -> list[Tensor]:
        g = grad(3 * loss, x, create_graph=True)[0]
        return [loss.detach(), g.detach(), grad(g, x, v)[0]]

    for a, b in zip(derivatives(MeanLoss.apply(x, target)), derivatives(cross_entropy(x, target)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)
