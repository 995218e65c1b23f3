"""Second moments of every expert's own routed inputs: what a calibrated quantizer needs to know of the data.

gate and up see the hidden states routed to the expert, down sees the gated product computed with original weights.
Moments are sums X^T X in float32 over the tokens, in the order shown; padding is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopeq.data.encode import model_inputs, no_padding
from mopeq.nouns import MoELayer, MoESpec
from mopeq.progress import progress
from mopeq.seam import Seen, model_layers, plain_forward, watch

Batch = dict[str, Tensor]


@dataclass
class Moments:
    """One layer's: `x` [E, in, in] of gate's and up's inputs, `h` [E, I, I] of down's, tokens seen per expert [E]."""

    x: Tensor
    h: Tensor
    tokens_E: Tensor

    def of(self, projection: str) -> Tensor:
        return self.h if projection == "down" else self.x

    @property
    def starved(self) -> list[int]:
        """Experts that no calibration token reached."""
        return [e for e, n in enumerate(self.tokens_E.tolist()) if n == 0]

    def fill_starved(self) -> None:
        """Give experts without tokens the layer's mean moments, so that they too are tuned for plausible inputs."""
        starved = self.starved
        if starved and len(starved) < len(self.tokens_E):
            for moments in (self.x, self.h):
                moments[starved] = moments.sum(0) / self.tokens_E.sum()


def layer_bytes(layer: MoELayer) -> int:
    """Memory of one layer's moments."""
    intermediate, hidden = layer.shapes["up"]
    return 4 * layer.experts * (hidden**2 + intermediate**2)


def collect(
    model: Any, spec: MoESpec, batches: Sequence[Batch], memory_bytes: int, wanted: set[int] | None = None
) -> Iterator[tuple[MoELayer, Moments]]:
    """The moments of the MoE layers wanted (all by default), as many a pass over the data as `memory_bytes` allows,
    at least one."""
    pairs = [pair for pair in model_layers(spec, model) if wanted is None or pair[0].layer in wanted]
    at = 0
    while at < len(pairs):
        end, used = at, 0
        while end < len(pairs) and (end == at or used + layer_bytes(pairs[end][0]) <= memory_bytes):
            used += layer_bytes(pairs[end][0])
            end += 1
        what = "calibrate" if end - at == len(pairs) else f"calibrate: layers {at + 1}-{end} of {len(pairs)}"
        yield from one_pass(model, pairs[at:end], batches, what)
        at = end


def one_pass(
    model: Any, pairs: list[tuple[MoELayer, Any]], batches: Sequence[Batch], what: str
) -> Iterator[tuple[MoELayer, Moments]]:
    device = next(model.parameters()).device
    found: dict[int, Moments] = {}
    for layer, module in pairs:
        intermediate, hidden = layer.shapes["up"]
        found[id(module)] = Moments(
            torch.zeros(layer.experts, hidden, hidden, device=device),
            torch.zeros(layer.experts, intermediate, intermediate, device=device),
            torch.zeros(layer.experts, dtype=torch.int64),
        )
    valid_T = torch.ones(0, dtype=torch.bool)

    def watcher(module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        moments = found.get(id(module))
        if moments is None:
            return plain_forward(module, x_TH, index_TK, weight_TK)

        def see(seen: Seen) -> None:
            keep = valid_T[seen.tokens]
            x, h = seen.inputs["up"][keep].float(), seen.inputs["down"][keep].float()
            moments.x[seen.expert].addmm_(x.T, x)
            moments.h[seen.expert].addmm_(h.T, h)
            moments.tokens_E[seen.expert] += x.shape[0]

        return plain_forward(module, x_TH, index_TK, weight_TK, see)

    total = sum(batch["input_ids"].numel() for batch in batches)
    with torch.no_grad(), watch(model, watcher), progress(what, total, "tokens") as p:
        for batch in batches:
            valid_T = no_padding(batch).flatten().to(device)
            model(**model_inputs(batch, device), use_cache=False)
            p.step(batch["input_ids"].numel())
    for layer, module in pairs:
        yield layer, found.pop(id(module))
