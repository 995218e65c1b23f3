"""Scales tuned end to end: the gradient against differences, what stays, what falls, the same twice."""

from __future__ import annotations

from typing import Any

import made
import pytest
import torch

from mopeq import tune
from mopeq.job import open_job
from mopeq.models import load_model
from mopeq.nouns import Format, MoESpec
from mopeq.options import Options
from mopeq.quant import rtn
from mopeq.seam import model_layers, weights
from mopeq.sense.scene import Batch
from mopeq.tensors import QWeight

Pieces = dict[tuple[int, str], list[tuple[list[int], QWeight]]]


def setting(kind: str) -> tuple[Any, MoESpec, Pieces, list[Batch]]:
    """A tiny model in memory, its experts at 2 and 3 bits by turns (groups of 24: a short last one), and batches."""
    job = open_job(made.source(kind), Options())
    model = load_model(job.folder, torch.float32, "cpu")
    pieces: Pieces = {}
    for layer, module in model_layers(job.spec, model):
        for p, w in weights(module).items():
            for bits in (2, 3):
                members = list(range(bits % 2, layer.experts, 2))
                pieces.setdefault((layer.layer, p), []).append((members, rtn.quantize(w[members], Format(bits, 24))))
    g = torch.Generator().manual_seed(1)
    return model, job.spec, pieces, [{"input_ids": torch.randint(5, 50, (4, 16), generator=g)} for _ in range(20)]


def divergence(model: Any, spec: MoESpec, pieces: Pieces, batch: Batch) -> float:
    """KL(original || quantized) in float64, written out; the model is left as it was."""
    with torch.no_grad():
        said = model(batch["input_ids"]).logits.double().log_softmax(-1)
        kept = [(w, w.clone()) for _, m in model_layers(spec, model) for w in weights(m).values()]
        for layer, module in model_layers(spec, model):
            for p, w in weights(module).items():
                for members, q in pieces[layer.layer, p]:
                    w[members] = q.dequantize()
        ours = model(batch["input_ids"]).logits.double().log_softmax(-1)
        for w, before in kept:
            w.copy_(before)
    return float((said.exp() * (said - ours)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_held_back_divergence_falls_and_only_scales_move(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOKENS", 64)
    monkeypatch.setattr(tune, "LEARNING_RATE", 1e-2)
    model, spec, pieces, batches = setting(kind)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = tune.tune_scales(model, spec, batches, pieces)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    held = [batch for kind in tune.hold_back(batches)[1] for batch in kind]
    for pieces_then, said in ((pieces, found.before), (found.pieces, found.after)):
        plain = sum(divergence(model, spec, pieces_then, batch) for batch in held) / len(held)
        assert said == pytest.approx(plain, rel=1e-3)
    assert found.after < 0.97 * found.before
    moved = 0
    for place, parts in pieces.items():
        for (members, old), (same, new) in zip(parts, found.pieces[place], strict=True):
            assert members == same and torch.equal(old.codes, new.codes) and old.format == new.format
            assert old.zeros is not None and new.zeros is not None and torch.equal(old.zeros, new.zeros)
            assert new.scales.dtype == torch.float16 and bool((new.scales > 0).all())
            moved += int((new.scales != old.scales).sum())
    assert moved
    again = tune.tune_scales(model, spec, batches, pieces)
    for place, parts in found.pieces.items():
        for (_, one), (_, other) in zip(parts, again.pieces[place], strict=True):
            assert torch.equal(one.scales, other.scales)


def test_gradient_of_a_scale_is_what_a_small_change_does() -> None:
    model, spec, pieces, batches = setting("olmoe")
    seen: dict[tuple[int, str], torch.Tensor] = {}
    take = tune.Piece.take

    def spy(self: tune.Piece, gradient: torch.Tensor) -> None:
        take(self, gradient)
        assert self.moved_MOG.grad is not None
        seen.setdefault(next(k for k, v in pieces.items() if any(m is self.members for m, _ in v)), self.moved_MOG.grad)

    tune.Piece.take = spy  # type: ignore[method-assign]
    try:
        tune.tune_scales(model, spec, batches[:1], pieces)
    finally:
        tune.Piece.take = take  # type: ignore[method-assign]
    checked = 0
    for place, gradient in seen.items():
        members, q = pieces[place][0]
        at = divmod(int(gradient.abs().argmax()), gradient[0].numel())
        index = (at[0], *divmod(at[1], gradient.shape[-1]))
        values = []
        for step in (-0.02, 0.02):
            scales = q.scales.float()
            scales[index] *= 1 + step
            changed = pieces | {place: [(members, QWeight(q.codes, scales, q.zeros, q.format)), *pieces[place][1:]]}
            values.append(divergence(model, spec, changed, batches[0]))
        assert (values[1] - values[0]) / 0.04 == pytest.approx(float(gradient[index].detach()), rel=0.1, abs=1e-7)
        checked += 1
    assert checked == len(pieces)


def test_who_judges() -> None:
    text = [{"input_ids": torch.zeros(1, n + 1)} for n in range(17)]
    asked: list[Batch] = [{"input_ids": torch.zeros(1, 2), "answer_mask": torch.ones(1, 2)} for _ in range(3)]
    learnt, judges = tune.hold_back([*text, *asked])
    assert [[len(b["input_ids"][0]) for b in kind] for kind in judges] == [[5, 13]]
    assert len(learnt) == 18 and all(b not in judges[0] for b in learnt if "answer_mask" in b)
    learnt, judges = tune.hold_back(asked)
    assert len(learnt) == 3 and len(judges[0]) == 3  # too few to hold any back
