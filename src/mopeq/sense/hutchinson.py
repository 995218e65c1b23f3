"""Hessian traces of the true loss (the paper's text; HAWQ-V2): E[v^T H v] = tr(H) for Rademacher v.

One v over all experts at once serves every matrix: the cross terms of different matrices have zero mean. Each (batch,
probe) is one sample, a run of its own; the standard error is over samples.

A matrix W is moved along its signs V by a number s: (W + s V) x, at s = 0. The Hessian by these numbers, one a matrix,
times ones is each matrix's part of v^T H v, so that no gradient by a weight is ever needed. Signs are drawn from what
they belong to, and drawn again wherever they are asked for: none are held, and every device and every order of work
sees the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mopeq.data.encode import model_inputs, no_padding
from mopeq.nouns import Sensitivity
from mopeq.progress import progress
from mopeq.quant.descent import slices
from mopeq.seam import model_layers, plain_forward, watch
from mopeq.sense import SENSORS
from mopeq.sense.frequency import Counts, token_facts
from mopeq.sense.scene import Batch, Scene, from_scores, walk
from mopeq.walk.walking import Walk

PROBES = SENSORS["hutchinson"].probes  # per batch
ROWS = 256  # of logits that are worked on at a time
NO_TARGET = -100


def sense(scene: Scene) -> Sensitivity:
    runs, moe = len(scene.batches) * PROBES, len(scene.spec.layers)
    sizes = np.repeat([float(batch["input_ids"].numel()) for batch in scene.batches], PROBES)
    # fused attention has no second derivative on CPUs; a few families use it whatever they are asked for
    with walk(scene, attention="eager") as walking, sdpa_kernel(SDPBackend.MATH):
        prober = Prober(scene, walking)
        losses = [partial(mean_loss, walking, batch) for batch in scene.batches for _ in range(PROBES)]
        with progress("sense: hutchinson", moe, "layers") as p, watch(walking.model, prober):
            for visit in walking.curvatures(losses):
                for _ in visit.each():
                    if visit.backward:
                        prober.take()
                    p.step(len(visit.layers) / runs * (1.0 if walking.whole else 0.5))
    mean_I, stderr_I = weighted_mean(prober.samples_SI(runs), sizes)
    return from_scores(scene, "hutchinson", mean_I, stderr_I, **token_facts(scene, prober.counts))


class Prober:
    """Watches the experts: counts what is routed to them, and puts a probe [E, P] into each layer."""

    def __init__(self, scene: Scene, walking: Walk):
        self.scene, self.walking = scene, walking
        self.layer_of = {id(module): layer for layer, module in model_layers(scene.spec, walking.model)}
        self.counts = Counts(scene, walking.model, lambda: walking.now // PROBES)
        self.counted: set[tuple[int, int]] = set()  # batches, by experts module
        self.found: dict[tuple[int, int], Tensor] = {}  # by sample and layer

    def __call__(self, module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        now, layer = self.walking.now, self.layer_of[id(module)]
        if (now // PROBES, id(module)) not in self.counted:  # a batch comes for each probe, and walking there and back
            self.counted.add((now // PROBES, id(module)))
            self.counts.see(module, index_TK, weight_TK)
        zeros_EP = torch.zeros(layer.experts, len(layer.projections), device=x_TH.device, requires_grad=True)
        probe_EP = self.walking.probes.setdefault(layer.layer, zeros_EP)  # layers that share weights share it

        def move(p: str, e: int, x: Tensor, y: Tensor) -> Tensor:
            at = layer.projections.index(p)
            place = (self.scene.seed, *divmod(now, PROBES), layer.layer, e, at)
            signed: Tensor = Signed.apply(x, partial(signs, place, *layer.shapes[p], x.device), False)
            return y + probe_EP[e, at] * signed

        return plain_forward(module, x_TH, index_TK, weight_TK, change=move)

    def take(self) -> None:
        """What the run that moved last left at its probes."""
        for layer, probe_EP in self.walking.probes.items():
            if probe_EP.grad is not None:
                key = (self.walking.now, layer)
                self.found[key] = self.found.get(key, 0.0) + probe_EP.grad.double().cpu()

    def samples_SI(self, runs: int) -> np.ndarray:
        """Each sample's v * Hv summed over each linear; linears the model does not build, or show nothing to, get 0."""
        rows = []
        for sample in range(runs):
            zeros = (torch.zeros(layer.experts, len(layer.projections)).double() for layer in self.scene.spec.layers)
            by_layer = zip(self.scene.spec.layers, zeros, strict=True)
            rows.append(torch.cat([self.found.get((sample, layer.layer), zero).flatten() for layer, zero in by_layer]))
        return torch.stack(rows).numpy()


class Signed(torch.autograd.Function):
    """x V^T, or x V where `turned`, for a matrix that is made each time; differentiable any number of times by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[], Tensor], turned: bool) -> Tensor:
        ctx.make, ctx.turned = make, turned
        return functional.linear(x, make().T if turned else make())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Signed.apply(g, ctx.make, not ctx.turned), None, None


def signs(place: tuple[int, ...], out: int, inputs: int, device: Any) -> Tensor:
    """Random signs [out, in] in float32 that belong to a place, one a bit of a generator whose stream no version
    changes."""
    words = np.random.PCG64(np.random.SeedSequence(place)).random_raw(-(-out * inputs // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=out * inputs)
    return torch.from_numpy(bits).float().mul_(2).sub_(1).view(out, inputs).to(device)


def mean_loss(walking: Walk, batch: Batch) -> Tensor:
    """Mean next-token loss (nats) over a batch; over the answer's tokens alone where there is an answer."""
    inputs = model_inputs(batch, walking.device)
    logits_BTV = walking.model(**inputs, use_cache=False).logits
    target_BT = torch.full_like(inputs["input_ids"], NO_TARGET)
    valid = batch.get("answer_mask", no_padding(batch)).to(walking.device)[:, 1:].bool()
    target_BT[:, :-1][valid] = inputs["input_ids"][:, 1:][valid]
    loss: Tensor = MeanLoss.apply(logits_BTV.flatten(0, 1).float(), target_BT.flatten())
    return loss


class MeanLoss(torch.autograd.Function):
    """Mean cross entropy of rows of logits that have a target, twice differentiable. All logits of a batch are held
    four times at most, where torch's own took twice as much: softmax is made anew of a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, target_S: Tensor) -> Tensor:
        ctx.save_for_backward(logits_SV, target_S)
        rows = zip(logits_SV.split(ROWS), target_S.split(ROWS), strict=True)
        sums = [functional.cross_entropy(x, y, ignore_index=NO_TARGET, reduction="sum") for x, y in rows]
        return torch.stack(sums).sum() / (target_S != NO_TARGET).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Slope.apply(*ctx.saved_tensors, g), None


class Slope(torch.autograd.Function):
    """The gradient of `MeanLoss` by the logits, times g."""

    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, target_S: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(logits_SV, target_S, g)
        slope_SV = torch.zeros_like(logits_SV)
        for at in slices(len(target_S), ROWS):
            counted = target_S[at] != NO_TARGET
            p_RV = logits_SV[at].softmax(-1)
            p_RV[counted, target_S[at][counted]] -= 1
            slope_SV[at] = p_RV * (g / (target_S != NO_TARGET).sum() * counted).unsqueeze(-1)
        return slope_SV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u_SV: Tensor) -> Any:
        logits_SV, target_S, g = ctx.saved_tensors
        along_SV = torch.empty_like(logits_SV)
        for at in slices(len(target_S), ROWS):
            pu_RV = (p_RV := logits_SV[at].softmax(-1)) * u_SV[at]
            pu_RV -= p_RV * pu_RV.sum(-1, keepdim=True)
            along_SV[at] = pu_RV * (g / (target_S != NO_TARGET).sum() * (target_S[at] != NO_TARGET)).unsqueeze(-1)
        return along_SV, None, None


def weighted_mean(samples_SI: np.ndarray, weight_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of samples weighted by their tokens, and its standard error (infinite for a single sample)."""
    share_S = weight_S / weight_S.sum()
    mean_I = share_S @ samples_SI
    if len(share_S) < 2:
        return mean_I, np.full_like(mean_I, np.inf)
    effective = 1 / float((share_S**2).sum())
    variance_I = share_S @ (samples_SI - mean_I) ** 2 * effective / (effective - 1)
    return mean_I, np.sqrt(variance_I / effective)
