"""Sensitivity of the true loss under the real quantizer, to second order (docs/methods.md).

With dW = Q_f(W) - W of the real quantizer, x a matrix's inputs and g the loss's gradient at its outputs:

    fisher      1/2 sum_t (g_t^T dW x_t)^2 / tokens          labels sampled from the model at every position
    fisher-seq  1/2 sum_rows (sum_t g_t^T dW x_t)^2 / tokens
    error       sum_t weight_t^2 |dW x_t|^2 / tokens         no gradients

One forward and one backward pass of a batch serve every expert, projection and format at once. With labels sampled
from the model, E[g g^T] is the Fisher information, which is the Hessian of KL(original || changed) at the original.

Text and pictures: sums are kept apart by row (a row with pictures counts as image) and divided by that modality's own
number of predicting positions; where both were shown, the cost is the mean of the two, so that a caption's few tokens
weigh as much as a page of text. What is left out: terms between different matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopeq.data.encode import model_inputs, no_padding
from mopeq.nouns import MoELayer, Sensitivity
from mopeq.progress import progress
from mopeq.quant import QUANTIZERS
from mopeq.seam import Seen, model_layers, plain_forward, watch, weights
from mopeq.sense.frequency import Counts, token_facts
from mopeq.sense.moments import Moments, collect
from mopeq.sense.scene import Batch, Scene
from mopeq.tables import pick


def fisher(scene: Scene) -> Sensitivity:
    return sense(scene, "fisher")


def fisher_seq(scene: Scene) -> Sensitivity:
    return sense(scene, "fisher-seq")


def error(scene: Scene) -> Sensitivity:
    return sense(scene, "error")


@dataclass
class Sums:
    """Running sums over batches of one modality, for means and their standard errors: s is a batch's sum, n its
    predicting positions."""

    s: np.ndarray
    ss: np.ndarray
    sn: np.ndarray
    n: float = 0.0
    nn: float = 0.0

    def add(self, s: np.ndarray, n: float) -> None:
        self.s += s
        self.ss += s * s
        self.sn += s * n
        self.n += n
        self.nn += n * n

    def mean(self) -> np.ndarray:
        return self.s / self.n

    def variance(self) -> np.ndarray:
        """Of the mean, by linearisation of the ratio sum(s) / sum(n)."""
        mean = self.mean()
        return np.maximum(self.ss - 2 * mean * self.sn + mean**2 * self.nn, 0) / self.n**2


@dataclass
class Taker:
    """Collects one batch's quadratic forms for the layers of a pass: {(layer, projection): [E, F]} in float64."""

    kind: str
    deltas: dict[tuple[int, str], list[Tensor]]  # per format [E, out, in]
    layer_of: dict[int, MoELayer]  # by id of the experts module
    counts: Counts | None
    rows: int = 1
    valid_T: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))
    found: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def __call__(self, module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if self.counts is not None:
            self.counts.see(module, index_TK, weight_TK)
        layer = self.layer_of.get(id(module))
        if layer is None:
            return plain_forward(module, x_TH, index_TK, weight_TK)
        row_length = x_TH.shape[0] // self.rows

        def see(seen: Seen) -> None:
            keep = self.valid_T[seen.tokens]
            row_S = seen.tokens[keep] // row_length
            for p, y in seen.outputs.items():
                x = seen.inputs[p].detach()[keep]
                if self.kind == "error":
                    self.take(layer, p, seen.expert, x, None, seen.weight.detach()[keep], row_S)
                else:
                    # the hook runs in the backward pass, with the gradient at this projection's outputs
                    def hook(g: Tensor, p: str = p, x: Tensor = x) -> None:
                        self.take(layer, p, seen.expert, x, g.detach()[keep], None, row_S)

                    y.register_hook(hook)

        return plain_forward(module, x_TH, index_TK, weight_TK, see)

    def take(
        self, layer: MoELayer, p: str, e: int, x: Tensor, g: Tensor | None, weight: Tensor | None, row_S: Tensor
    ) -> None:
        key = (layer.layer, p)
        for f, delta_ENC in enumerate(self.deltas[key]):
            moved = x @ delta_ENC[e].T  # dW x, [S, out]
            if g is None:
                assert weight is not None
                value = (moved.square().sum(-1) * weight**2).double().sum()
            else:
                along_S = (moved * g).sum(-1).double()
                if self.kind == "fisher-seq":
                    along_S = along_S.new_zeros(self.rows).index_add_(0, row_S, along_S)
                value = 0.5 * along_S.square().sum()
            self.found[key][e, f] += value.cpu()


def sense(scene: Scene, kind: str) -> Sensitivity:
    assert scene.model is not None
    model = scene.model(None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if kind != "error":  # so that every hidden state has a gradient; the weights need none
        for parameter in model.get_input_embeddings().parameters():
            parameter.requires_grad_(True)
    pairs = model_layers(scene.spec, model)
    counts = Counts(scene, model)
    index = {layer.layer: i for i, layer in enumerate(scene.spec.layers)}
    formats = len(scene.formats)
    costs = {layer.layer: np.zeros((layer.experts, len(layer.projections), formats)) for layer in scene.spec.layers}
    variances = {n: np.zeros_like(c) for n, c in costs.items()}
    for first, last in passes(scene, pairs):
        part = pairs[first:last]
        what = f"sense: {kind}" + ("" if last - first == len(pairs) else f", layers {first + 1}-{last} of {len(pairs)}")
        sums = one_pass(scene, kind, model, part, counts if first == 0 else None, what)
        for layer, _ in part:
            shape = (layer.experts, len(layer.projections), formats)
            kinds = sums[layer.layer]
            costs[layer.layer] = np.mean([s.mean() for s in kinds.values()], axis=0).reshape(shape)
            variances[layer.layer] = (np.sum([s.variance() for s in kinds.values()], axis=0) / len(kinds) ** 2).reshape(
                shape
            )
    order = sorted(index, key=index.__getitem__)
    return Sensitivity(
        kind,
        tuple(i for i, _ in scene.spec.linears),
        scene.formats,
        np.concatenate([costs[n].reshape(-1, formats) for n in order]),
        stderr_IF=np.sqrt(np.concatenate([variances[n].reshape(-1, formats) for n in order])),
        unit="score" if kind == "error" else "nats per token",
        data_digest=scene.data_digest,
        **token_facts(scene, counts),
    )


def passes(scene: Scene, pairs: list[tuple[MoELayer, Any]]) -> list[tuple[int, int]]:
    """Runs of layers whose candidates (all formats' errors, float32) fit the memory together, at least one layer."""
    found, at = [], 0
    while at < len(pairs):
        end, used = at, 0
        while end < len(pairs):
            layer = pairs[end][0]
            size = 4 * len(scene.formats) * layer.params
            if end > at and used + size > scene.memory_bytes:
                break
            used += size
            end += 1
        found.append((at, end))
        at = end
    return found


def candidate_errors(scene: Scene, model: Any, part: list[tuple[MoELayer, Any]]) -> dict[tuple[int, str], list[Tensor]]:
    """Q_f(W) - W of the real quantizer for every layer of a pass: {(layer, projection): per format [E, out, in]}."""
    quantize = pick(QUANTIZERS, scene.quantizer, "quantization method")
    moments: dict[int, Moments] = {}
    if QUANTIZERS[scene.quantizer].needs_data:
        wanted = {layer.layer for layer, _ in part}
        for layer, seen in collect(model, scene.spec, scene.batches, scene.memory_bytes, wanted):
            seen.fill_starved()
            moments[layer.layer] = seen
    deltas = {}
    total = len(scene.formats) * sum(layer.params for layer, _ in part)
    with torch.no_grad(), progress(f"sense: candidates by {scene.quantizer}", total, "weights") as p:
        for layer, module in part:
            for projection, w in weights(module).items():
                m = moments[layer.layer].of(projection) if moments else None
                rows = []
                for fmt in scene.formats:
                    rows.append(quantize(w.float(), fmt, moments=m, seed=scene.seed).dequantize() - w.float())
                    p.step(w.numel())
                deltas[layer.layer, projection] = rows
    return deltas


def one_pass(
    scene: Scene, kind: str, model: Any, part: list[tuple[MoELayer, Any]], counts: Counts | None, what: str
) -> dict[int, dict[str, Sums]]:
    """Show all batches once; {layer: {modality: sums over [E * P, F]}}."""
    taker = Taker(kind, candidate_errors(scene, model, part), {id(m): layer for layer, m in part}, counts)
    generator = torch.Generator().manual_seed(scene.seed)
    device = next(model.parameters()).device
    sums: dict[int, dict[str, Sums]] = {layer.layer: {} for layer, _ in part}
    total = sum(batch["input_ids"].numel() for batch in scene.batches)
    with watch(model, taker), progress(what, total, "tokens") as p:
        for batch in scene.batches:
            if counts is not None:
                counts.show(batch)
            show(taker, batch, scene, device)
            n = run_batch(kind, model, batch, generator, device)
            modality = "image" if "image_mask" in batch else "text"
            for layer, _ in part:
                value = torch.stack([taker.found[layer.layer, q] for q in layer.projections], 1).numpy()
                zero = np.zeros_like(value)
                kept = sums[layer.layer].setdefault(modality, Sums(zero, zero.copy(), zero.copy()))
                kept.add(value, n)
            p.step(batch["input_ids"].numel())
    return sums


def show(taker: Taker, batch: Batch, scene: Scene, device: Any) -> None:
    """Set the taker up for a batch: its rows, its positions that are no padding, empty sums."""
    taker.rows = batch["input_ids"].shape[0]
    taker.valid_T = no_padding(batch).flatten().to(device)
    for (layer, p), rows in taker.deltas.items():
        taker.found[layer, p] = torch.zeros(rows[0].shape[0], len(scene.formats), dtype=torch.float64)


def run_batch(kind: str, model: Any, batch: Batch, generator: torch.Generator, device: Any) -> float:
    """Run a batch forward (and, but for `error`, backward from sampled labels); the number of predicting positions."""
    inputs = model_inputs(batch, device)
    predicts_BT = predicting(batch)
    if kind == "error":
        with torch.no_grad():
            model(**inputs, use_cache=False)
        return float(predicts_BT.sum())
    with torch.enable_grad():
        logits_SV = model(**inputs, use_cache=False).logits[predicts_BT.to(device)].float()
    # sampled on the CPU by inverse distribution, so that every device draws alike
    cumulative = logits_SV.detach().double().softmax(-1).cumsum(-1).cpu()
    u = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, u).squeeze(-1).clamp_max(cumulative.shape[-1] - 1)
    torch.nn.functional.cross_entropy(logits_SV, labels.to(device), reduction="sum").backward()
    model.zero_grad(set_to_none=True)
    return float(predicts_BT.sum())


def predicting(batch: Batch) -> Tensor:
    """Positions [B, T] whose prediction counts: those before an answer's tokens, else all that are no padding."""
    valid = no_padding(batch)
    if "answer_mask" not in batch:
        return valid & ~batch.get("image_mask", torch.zeros_like(valid)).bool()
    ahead = torch.zeros_like(valid)
    ahead[:, :-1] = batch["answer_mask"][:, 1:].bool()
    return ahead & valid
