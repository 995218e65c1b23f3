"""Moments of routed inputs: every expert leans on its layer by a fixed number of tokens."""

from __future__ import annotations

import made
import pytest
import torch

from mopeq.job import open_job
from mopeq.kernels import dense
from mopeq.models import load_model
from mopeq.options import Options
from mopeq.seam import Seen, model_layers, plain_forward, watch
from mopeq.sense.labels import sampled_loss
from mopeq.sense.moments import PRIOR_TOKENS, Moments, collect
from mopeq.walk.parts import resident
from mopeq.walk.walking import Walk


def test_experts_lean_on_their_layer() -> None:
    x, h = torch.rand(3, 4, 4), torch.rand(3, 2, 2)
    x[1], h[1] = 0, 0
    g = torch.rand(3, 5, 5)
    g[1] = 0
    seen = Moments(x.clone(), h.clone(), torch.tensor([30, 0, 70]), {"up": g.clone()})
    assert seen.starved == [1]
    seen.fill_starved()
    assert seen.starved == [1]
    for got, given in ((seen.x, x), (seen.h, h), (seen.gradients["up"], g)):
        mean = given.sum(0) / 100
        assert torch.allclose(got, given + PRIOR_TOKENS * mean)
        assert torch.allclose(got[1], PRIOR_TOKENS * mean)


def test_a_layer_without_tokens_stays_without() -> None:
    seen = Moments(torch.zeros(2, 4, 4), torch.zeros(2, 2, 2), torch.zeros(2, dtype=torch.int64))
    seen.fill_starved()
    assert not bool(seen.x.any()) and seen.starved == [0, 1]


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_moments_of_gradients_are_those_of_each_token(kind: str) -> None:
    """Against one backward pass a token choice, through the module's own arithmetic."""
    job = open_job(made.source(kind), Options())
    model = load_model(job.folder, torch.float32, "cpu")
    ids = torch.arange(5, 29).view(2, 12) % 50
    batches = [{"input_ids": ids}, {"input_ids": ids + 3}]
    found = list(collect(model, job.spec, batches, 1 << 30, label_seed=4))
    plain = {layer.layer: seen for layer, seen in collect(model, job.spec, batches, 1 << 30)}
    outputs: dict[tuple[int, int, str], list[torch.Tensor]] = {}
    walking = Walk(resident(model, job.spec))
    modules = {id(module): layer for layer, module in model_layers(job.spec, model)}

    def keep(module, x_TH, index_TK, weight_TK):  # type: ignore[no-untyped-def]
        def see(seen: Seen) -> None:
            for p, y in seen.outputs.items():
                y.retain_grad()
                outputs.setdefault((modules[id(module)].layer, seen.expert, p), []).append(y)

        x_TH.requires_grad_(True)
        return plain_forward(module, x_TH, index_TK, weight_TK, see)

    generator = torch.Generator().manual_seed(4)
    with watch(model, keep):
        for batch in batches:
            loss = sampled_loss(walking, batch, generator)
            assert loss is not None
            loss.backward()
    assert outputs
    for layer, seen in found:
        assert torch.equal(seen.x, plain[layer.layer].x) and torch.equal(seen.h, plain[layer.layer].h)
        for p in layer.projections:
            for e in range(layer.experts):
                want = sum(
                    (y.grad.double().T @ y.grad.double() for y in outputs.get((layer.layer, e, p), [])),
                    torch.zeros(seen.gradients[p].shape[1:], dtype=torch.float64),
                )
                assert torch.allclose(
                    seen.gradients[p][e].double(), want, rtol=1e-4, atol=1e-6 * float(want.abs().max())
                )


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_moments_are_whole_whoever_multiplies(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By AMX, where it is here, products are made on and above the diagonal alone."""
    job = open_job(made.source(kind), Options())
    model = load_model(job.folder, torch.float32, "cpu")
    batches = [{"input_ids": (torch.arange(5, 53).view(2, 24) + n) % 50} for n in range(3)]
    found: list[list[torch.Tensor]] = []
    for least in (1 << 62, 0):
        monkeypatch.setattr(dense, "SMALL", least)
        layers = [seen for _, seen in collect(model, job.spec, batches, 1 << 30, label_seed=4)]
        found.append([t for seen in layers for t in (seen.x, seen.h, *seen.gradients.values())])
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(ours, ours.mT) and torch.equal(theirs, theirs.mT)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
