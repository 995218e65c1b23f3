"""The loss of sampled labels against torch's own in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from mopeq.sense import labels
from mopeq.sense.labels import SampledLoss, draw


@pytest.mark.parametrize("words", [1, 2, 127, 128, 129, 1000])
def test_labels_are_where_the_distribution_reaches_u(words: int) -> None:
    rng = torch.Generator().manual_seed(int(np.random.default_rng().integers(1 << 30)))
    logits = 3 * torch.randn(300, words, generator=rng)
    u = torch.rand(300, generator=rng, dtype=torch.float64)
    label, total = draw(logits.exp(), u)
    share = logits.double().exp()
    assert torch.allclose(total, share.sum(-1, keepdim=True), rtol=1e-6)
    upto = torch.nn.functional.pad((share / share.sum(-1, keepdim=True)).cumsum(-1), (1, 0))
    assert (upto.gather(1, label).squeeze(1) <= u + 1e-6).all()
    assert (upto.gather(1, label + 1).squeeze(1) >= u - 1e-6).all()


def test_words_without_probability_are_never_drawn() -> None:
    p = torch.zeros(3, 300)
    p[0, 150], p[1, 299], p[2, 0] = 0.5, 1e-30, 2.0
    for u in (0.0, 0.3, 1 - 2**-53):
        assert draw(p, torch.full((3,), u, dtype=torch.float64))[0].flatten().tolist() == [150, 299, 0]


def test_sums_that_are_rounded_otherwise_draw_no_word_without_probability() -> None:
    rng = torch.Generator().manual_seed(int(np.random.default_rng().integers(1 << 30)))
    p = torch.randn(4000, 200, generator=rng).mul(4).exp()
    p[:, 100:] = 0
    for ends in range(1, 4):
        label, _ = draw(p, torch.full((4000,), 1 - ends * 2**-53, dtype=torch.float64))
        assert (p.gather(1, label) > 0).all()


@pytest.mark.parametrize("at_a_time", [1 << 21, 1500, 1])
def test_loss_and_gradient(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "DRAWN", at_a_time)
    rng = torch.Generator().manual_seed(int(np.random.default_rng().integers(1 << 30)))
    logits = (5 * torch.randn(40, 515, generator=rng) + 100).requires_grad_(True)
    u = torch.rand(40, generator=rng, dtype=torch.float64)
    loss = SampledLoss.apply(logits, u)
    (2 * loss).backward()  # type: ignore[no-untyped-call]
    exact = logits.detach().double().requires_grad_(True)
    label, _ = draw((exact - exact.amax(-1, keepdim=True)).detach().float().exp(), u)
    wanted = cross_entropy(exact, label.squeeze(1), reduction="sum")
    (2 * wanted).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and exact.grad is not None
    assert torch.allclose(loss.double(), wanted, rtol=1e-5)
    assert torch.allclose(logits.grad.double(), exact.grad, atol=2e-6)


def test_no_positions() -> None:
    logits = torch.zeros(0, 10, requires_grad=True)
    loss = SampledLoss.apply(logits, torch.zeros(0, dtype=torch.float64))
    loss.backward()
    assert loss == 0 and logits.grad is not None and logits.grad.shape == (0, 10)


def test_the_gradient_is_let_go_though_the_loss_is_kept() -> None:
    logits = torch.zeros(3, 10, requires_grad=True)
    loss = SampledLoss.apply(logits, torch.zeros(3, dtype=torch.float64))
    loss.backward(retain_graph=True)
    loss.backward()
    assert logits.grad is not None and torch.allclose(logits.grad.sum(), torch.zeros(()), atol=1e-5)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
