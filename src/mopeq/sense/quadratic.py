"""Sensitivity of the true loss under the real quantizer, to second order (docs/methods.md).

With dW = Q_f(W) - W of the real quantizer, x a matrix's inputs and g the loss's gradient at its outputs:

    fisher      1/2 sum_t (g_t^T dW x_t)^2 / tokens          labels sampled from the model at every position
    fisher-seq  1/2 sum_rows (sum_t g_t^T dW x_t)^2 / tokens
    error       sum_t weight_t^2 |dW x_t|^2 / tokens         no gradients

One forward and one backward pass serve every expert, projection and format at once. With labels sampled
from the model, E[g g^T] is the Fisher information, which is the Hessian of KL(original || changed) at the original.

Text and pictures: sums are kept apart by row (a row with pictures counts as image) and divided by that modality's own
number of predicting positions; where both were shown, the cost is the mean of the two, so that a caption's few tokens
weigh as much as a page of text. What is left out: terms between different matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopeq.data.encode import model_inputs, no_padding
from mopeq.nouns import MoELayer, Sensitivity
from mopeq.progress import progress
from mopeq.quant import QUANTIZERS
from mopeq.seam import Seen, plain_forward, watch, weights
from mopeq.sense.frequency import Counts, token_facts
from mopeq.sense.moments import Adding
from mopeq.sense.scene import Batch, Scene, shows, walk
from mopeq.tables import pick
from mopeq.tensors import QWeight
from mopeq.walk.walking import Visit, Walk

CHUNK = 1 << 24  # weights quantized at a time
DRAWN = 256  # rows whose labels are drawn at a time


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


class Taker:
    """Watches the layers of a visit and takes each batch's quadratic forms: {(batch, layer, projection): [E, F]}."""

    def __init__(self, kind: str, scene: Scene, walking: Walk):
        self.kind, self.scene, self.walking = kind, scene, walking
        self.counts = Counts(scene, walking.model, lambda: walking.now)
        self.counting = True
        self.layer_of: dict[int, MoELayer] = {}  # by id of the experts module
        self.candidates: dict[tuple[int, str], list[QWeight]] = {}  # per format
        self.found: dict[tuple[int, int, str], Tensor] = {}

    def __call__(self, module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if self.counting:
            self.counts.see(module, index_TK, weight_TK)
        layer = self.layer_of.get(id(module))
        if layer is None:
            return plain_forward(module, x_TH, index_TK, weight_TK)
        if self.kind != "error":
            x_TH.requires_grad_(True)  # so that the first layer's matrices have gradients; the weights need none
        now, batch = self.walking.now, self.scene.batches[self.walking.now]
        valid_T, rows = no_padding(batch).flatten().to(x_TH.device), batch["input_ids"].shape[0]
        row_length = x_TH.shape[0] // rows
        w = weights(module)
        for p in layer.projections:
            shape = (layer.experts, len(self.scene.formats))
            self.found[now, layer.layer, p] = torch.zeros(shape, dtype=torch.float64, device=x_TH.device)

        def see(seen: Seen) -> None:
            keep = valid_T[seen.tokens]
            row_S = seen.tokens[keep] // row_length
            for p, y in seen.outputs.items():
                x = seen.inputs[p].detach()[keep]
                w_NC, found = w[p].detach()[seen.expert], self.found[now, layer.layer, p][seen.expert]
                candidates = [q[seen.expert] for q in self.candidates[layer.layer, p]]
                if self.kind == "error":
                    found += output_errors(candidates, w_NC, x, seen.weight.detach()[keep])
                    continue

                row = row_S if self.kind == "fisher-seq" else None
                take = partial(loss_increases, candidates, w_NC, x, row, rows)
                y.register_hook(partial(add_taken, found, take, keep))  # runs in the backward pass

        return plain_forward(module, x_TH, index_TK, weight_TK, see)


def moved(q: QWeight, w_NC: Tensor, x_SC: Tensor) -> Tensor:
    """dW x [S, out] of one candidate."""
    return x_SC @ (q.dequantize() - w_NC.float()).T


def output_errors(candidates: list[QWeight], w_NC: Tensor, x_SC: Tensor, weight_S: Tensor) -> Tensor:
    """sum_t weight_t^2 |dW x_t|^2 of each candidate [F], in float64."""
    terms = [(moved(q, w_NC, x_SC).square().sum(-1) * weight_S**2).double().sum() for q in candidates]
    return torch.stack(terms)


def loss_increases(
    candidates: list[QWeight], w_NC: Tensor, x_SC: Tensor, row_S: Tensor | None, rows: int, g_SN: Tensor
) -> Tensor:
    """1/2 sum (g^T dW x)^2 of each candidate [F], in float64: over tokens, or over the sums of rows where given."""
    terms = []
    for q in candidates:
        along_S = (moved(q, w_NC, x_SC) * g_SN).sum(-1).double()
        if row_S is not None:
            along_S = along_S.new_zeros(rows).index_add_(0, row_S, along_S)
        terms.append(0.5 * along_S.square().sum())
    return torch.stack(terms)


def add_taken(found_F: Tensor, take: Callable[[Tensor], Tensor], keep_S: Tensor, g_SN: Tensor) -> None:
    """Hook of a projection's outputs, called with their gradient."""
    found_F += take(g_SN.detach()[keep_S])


def sense(scene: Scene, kind: str) -> Sensitivity:
    shape = {x.layer: (x.experts, len(x.projections), len(scene.formats)) for x in scene.spec.layers}
    cost = {n: np.zeros(size) for n, size in shape.items()}
    variance = {n: np.zeros(size) for n, size in shape.items()}
    generator = torch.Generator().manual_seed(scene.seed)
    with walk(scene, exact=kind != "error") as walking:
        taker = Taker(kind, scene, walking)
        if kind == "error":
            visits = walking.forward(shows(walking, scene.batches), layers_only=True)
        else:
            visits = walking.gradients([partial(sampled_loss, walking, b, generator) for b in scene.batches])
        with progress(f"sense: {kind}", len(scene.spec.layers), "layers") as p:
            for visit in visits:
                taker.counting = walking.whole or not visit.backward
                pairs = visit.layers if visit.backward or kind == "error" else ()
                taker.layer_of = {id(module): layer for layer, module in pairs}
                taker.candidates = candidates(scene, walking, visit, pairs)
                with watch(walking.model, taker):
                    visit.run()
                for layer, _ in pairs:
                    cost[layer.layer], variance[layer.layer] = estimate(scene, layer, taker.found)
                p.step(len(pairs))
                taker.found.clear()
                taker.candidates.clear()  # before the next layer comes
    return Sensitivity(
        kind,
        tuple(i for i, _ in scene.spec.linears),
        scene.formats,
        np.concatenate([c.reshape(-1, len(scene.formats)) for c in cost.values()]),
        stderr_IF=np.sqrt(np.concatenate([v.reshape(-1, len(scene.formats)) for v in variance.values()])),
        unit="score" if kind == "error" else "nats per token",
        data_digest=scene.data_digest,
        **token_facts(scene, taker.counts),
    )


def estimate(
    scene: Scene, layer: MoELayer, found: Mapping[tuple[int, int, str], Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """A layer's costs [E, P, F] and their variances, from the quadratic forms of all batches."""
    sums: dict[str, Sums] = {}
    unused = torch.zeros(layer.experts, len(scene.formats), dtype=torch.float64)  # a picture tower's, without pictures
    for number, batch in enumerate(scene.batches):
        value = torch.stack([found.get((number, layer.layer, p), unused) for p in layer.projections], 1).cpu().numpy()
        zero = np.zeros_like(value)
        kept = sums.setdefault("image" if "image_mask" in batch else "text", Sums(zero, zero.copy(), zero.copy()))
        kept.add(value, float(predicting(batch).sum()))
    mean = np.mean([s.mean() for s in sums.values()], axis=0)
    return mean, np.sum([s.variance() for s in sums.values()], axis=0) / len(sums) ** 2


def candidates(
    scene: Scene, walking: Walk, visit: Visit, pairs: Sequence[tuple[MoELayer, Any]]
) -> dict[tuple[int, str], list[QWeight]]:
    """What the real quantizer makes of each layer of a visit: {(layer, projection): one QWeight [E, …] a format}."""
    if not pairs:
        return {}
    quantize = pick(QUANTIZERS, scene.quantizer, "quantization method")
    adding = Adding(walking, scene.batches, pairs if QUANTIZERS[scene.quantizer].needs_data else ())
    if adding.found:
        with watch(walking.model, adding):
            visit.rehearse()
    made = {}
    for layer, module in pairs:
        seen = adding.found.pop(id(module), None)
        if seen is not None:
            seen.fill_starved()
        for p, w_ENC in weights(module).items():
            m = None if seen is None else seen.of(p)
            size = max(1, CHUNK // (w_ENC.shape[1] * w_ENC.shape[2]))
            made[layer.layer, p] = [
                QWeight.join(
                    [
                        quantize(w.float(), fmt, moments=None if m is None else m[at : at + size], seed=scene.seed)
                        for at, w in ((at, w_ENC[at : at + size]) for at in range(0, layer.experts, size))
                    ]
                )
                for fmt in scene.formats
            ]
    return made


def sampled_loss(walking: Walk, batch: Batch, generator: torch.Generator) -> Tensor | None:
    """The summed loss (nats) of labels drawn from the model's own predictions, over the positions that predict.

    None, and nothing is drawn, where no gradient is asked for: in a rehearsal.
    """
    predicts_BT = predicting(batch).to(walking.device)
    logits_SV = walking.model(**model_inputs(batch, walking.device), use_cache=False).logits[predicts_BT].float()
    if not torch.is_grad_enabled():
        return None
    labels_S = torch.cat([draw(rows, generator) for rows in logits_SV.detach().split(DRAWN)])
    return torch.nn.functional.cross_entropy(logits_SV, labels_S.to(walking.device), reduction="sum")


def draw(logits_SV: Tensor, generator: torch.Generator) -> Tensor:
    """A label for each row, by inverse distribution on the CPU, so that every device draws alike."""
    cumulative = logits_SV.double().softmax(-1).cumsum(-1).cpu()
    u = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, u).squeeze(-1).clamp_max(cumulative.shape[-1] - 1)


def predicting(batch: Batch) -> Tensor:
    """Positions [B, T] whose prediction counts: those before an answer's tokens, else all that are no padding."""
    valid = no_padding(batch)
    if "answer_mask" not in batch:
        return valid & ~batch.get("image_mask", torch.zeros_like(valid)).bool()
    ahead = torch.zeros_like(valid)
    ahead[:, :-1] = batch["answer_mask"][:, 1:].bool()
    return ahead & valid
