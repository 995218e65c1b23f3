"""Second moments of every expert's own routed inputs, and of the loss's gradients at its outputs: what calibrated
quantizers need to know of the data.

gate and up see the hidden states routed to the expert, down sees the gated product computed with original weights.
Moments are sums of |g| x x^T in float32 over the tokens, in the order shown; padding is left out. g is the weight the
router gives the expert's output: measured at 2 bits, weighting by it once lowers the KL by 4 % against no weighting
and by 2 % against its square (which is what the output's squared error alone would ask for).

Moments of gradients are sums of g g^T over the same tokens, g the gradient of the loss of sampled labels at a
projection's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mopeq.kernels.dense import add_moments, mirror
from mopeq.nouns import MoELayer, MoESpec
from mopeq.progress import progress
from mopeq.quant import moment_bytes
from mopeq.quant.descent import Inputs
from mopeq.seam import Seen, model_layers, plain_forward, shown, watch
from mopeq.sense.labels import sampled_loss
from mopeq.sense.scene import Batch, real_rows, shows
from mopeq.walk.parts import resident
from mopeq.walk.walking import Walk

PRIOR_TOKENS = 128  # of the layer's mean moments, added to each expert's


@dataclass
class Moments:
    """One layer's: `x` [E, in, in] of gate's and up's inputs, `h` [E, I, I] of down's, tokens seen per expert [E];
    `gradients` {projection: [E, out, out]} where they were asked for."""

    x: Tensor
    h: Tensor
    tokens_E: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def of(self, projection: str) -> Tensor:
        return self.h if projection == "down" else self.x

    def inputs(self, some: slice) -> dict[str, Inputs]:
        """Those of some experts for quantizers, by projection: gate and up share theirs."""
        x, h = Inputs(self.x[some]), Inputs(self.h[some])
        return {"gate": x, "up": x, "down": h}

    @property
    def starved(self) -> list[int]:
        """Experts that no calibration token reached."""
        return [e for e, n in enumerate(self.tokens_E.tolist()) if n == 0]

    @property
    def finite(self) -> bool:
        """Whether all inputs were: a diagonal tells of its whole matrix."""
        return all(bool(m.diagonal(dim1=-2, dim2=-1).isfinite().all()) for m in (self.x, self.h))

    def fill_starved(self) -> None:
        """Lean every expert on its layer: as if PRIOR_TOKENS tokens of the layer's mean had been routed to it as well.

        Experts with many tokens hardly notice; those with none are tuned for the layer's mean alone.
        """
        if tokens := int(self.tokens_E.sum()):
            for moments in (self.x, self.h, *self.gradients.values()):
                moments += moments.sum(0) * (PRIOR_TOKENS / tokens)


def collect(
    model: Any,
    spec: MoESpec,
    batches: Sequence[Batch],
    memory_bytes: int,
    wanted: set[int] | None = None,
    label_seed: int | None = None,
) -> Iterator[tuple[MoELayer, Moments]]:
    """The moments of the MoE layers wanted (all by default) of a model in memory, as many a pass over the data as
    `memory_bytes` allows, at least one; with those of gradients where labels have a seed."""
    model.requires_grad_(False)
    walking = Walk(resident(model, spec))
    gradients = label_seed is not None
    pairs = [layer for layer, _ in model_layers(spec, model) if wanted is None or layer.layer in wanted]
    at = 0
    while at < len(pairs):
        end, used = at, 0
        while end < len(pairs) and (end == at or used + moment_bytes(pairs[end], gradients) <= memory_bytes):
            used += moment_bytes(pairs[end], gradients)
            end += 1
        with progress("calibrate", end - at, "layers") as p:
            for layer, _, moments in gather(walking, batches, {layer.layer for layer in pairs[at:end]}, label_seed):
                p.step(1)
                yield layer, moments
        at = end


def gather(
    walking: Walk, batches: Sequence[Batch], wanted: set[int], label_seed: int | None = None
) -> Iterator[tuple[MoELayer, Any, Moments]]:
    """(layer, experts module, moments) of the MoE layers wanted, each as soon as all batches have passed it (on the way
    back, where gradients are asked for by a seed for their labels), while the module has its weights."""
    left = len(wanted)
    if label_seed is None:
        visits = walking.forward(shows(walking, batches), layers_only=True)
    else:
        generator = torch.Generator().manual_seed(label_seed)
        visits = walking.gradients([partial(sampled_loss, walking, batch, generator) for batch in batches])
    for visit in visits:
        here = visit.layers if visit.backward or label_seed is None else ()
        pairs = [(layer, module) for layer, module in here if layer.layer in wanted]
        adding = Adding(walking, batches, pairs, gradients=visit.backward)
        with watch(walking.model, adding):
            visit.run()
        for layer, module in pairs:
            left -= 1
            yield layer, module, adding.take(module)
        if not left:
            return


class Adding:
    """Watches some layers and adds up their moments; with those of gradients, which the backward pass brings."""

    def __init__(
        self, walking: Walk, batches: Sequence[Batch], pairs: Sequence[tuple[MoELayer, Any]], gradients: bool = False
    ):
        self.walking, self.batches = walking, batches
        self.found: dict[int, Moments] = {}  # by id of the experts module
        for layer, module in pairs:
            intermediate, hidden = layer.shapes["up"]
            self.found[id(module)] = Moments(
                torch.zeros(layer.experts, hidden, hidden, device=walking.device),
                torch.zeros(layer.experts, intermediate, intermediate, device=walking.device),
                torch.zeros(layer.experts, dtype=torch.int64),
            )
            if gradients:
                for p, (out, _) in layer.shapes.items():
                    kept = torch.zeros(layer.experts, out, out, device=walking.device)
                    self.found[id(module)].gradients[p] = kept

    def take(self, module: Any) -> Moments:
        """A layer's moments, once all is added."""
        moments = self.found.pop(id(module))
        for sums in (moments.x, moments.h, *moments.gradients.values()):
            mirror(sums)
        return moments

    def __call__(self, module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        moments = self.found.get(id(module))
        if moments is None:
            return plain_forward(module, x_TH, index_TK, weight_TK)
        real = real_rows(self.batches[self.walking.now], x_TH.device)

        def see(seen: Seen) -> None:
            keep = real(seen)
            x, h = (shown(seen.inputs[p], keep).float() for p in ("up", "down"))
            g = shown(seen.weight, keep).float().abs().unsqueeze(-1)
            add_moments(moments.x[seen.expert], x * g, x)
            add_moments(moments.h[seen.expert], h * g, h)
            moments.tokens_E[seen.expert] += x.shape[0]
            for p, sums in moments.gradients.items():
                seen.outputs[p].register_hook(partial(add_squares, sums[seen.expert], keep))

        if moments.gradients:
            x_TH.requires_grad_(True)  # so that the first layer's matrices have gradients; the weights need none
        return plain_forward(module, x_TH, index_TK, weight_TK, see)


def add_squares(sums_NN: Tensor, keep_S: Tensor | None, g_SN: Tensor) -> None:
    """Hook of a projection's outputs, called with their gradient."""
    g = shown(g_SN, keep_S).float()
    add_moments(sums_NN, g, g)
