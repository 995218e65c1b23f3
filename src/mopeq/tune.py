"""Scales tuned end to end: a few steps of Adam on KL(original || quantized); codes, zero points and bytes stay.

Each step shows TOKENS of calibration to the original and to the quantized model. A scale moves by a share of itself, so
one learning rate serves all; its gradient is the sum of dKL/dW * W over the group's weights. A part of the batches is
held back: whoever tunes can see whether the KL falls there, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mopeq.nouns import MoESpec
from mopeq.quant.rtn import LARGEST, SMALLEST, grouped, stored_scale
from mopeq.seam import model_layers, stored, views, weights
from mopeq.sense.labels import predicting_logits
from mopeq.sense.scene import Batch
from mopeq.tensors import Members, Pieces, Place, QWeight, per_input

LEARNING_RATE = 3e-3  # of a scale's own size, at the first step; falls to 0 as a cosine
BETAS = (0.9, 0.99)
TOKENS = 1024  # shown a step, at least
HELD = 8  # one batch in so many, of each kind, is held back


@dataclass
class Piece:
    """A projection's matrices of one format: q's values W [M, out, in], and by how much each scale has moved."""

    members: Members
    q: QWeight
    values: Tensor
    moved_MOG: Tensor

    def now(self) -> Tensor:
        return self.values * per_input(1 + self.moved_MOG, self.q.format.group_size, self.values.shape[-1])

    def take(self, gradient_EOC: Tensor) -> None:
        """The gradient of `moved` from that of the weights."""
        product = gradient_EOC[self.members].float() * self.values
        self.moved_MOG.grad = grouped(product, self.q.format.group_size).sum(-1)

    def result(self) -> QWeight:
        scales = self.q.scales.float() * (1 + self.moved_MOG.detach())
        return replace(self.q, scales=stored_scale(scales.clamp(SMALLEST, LARGEST)).half())


@dataclass(frozen=True)
class Tuned:
    """The pieces with their scales tuned, and the held-back KL before and after: nats per predicting position, the mean
    of its kinds (text, questions, pictures) where there are several."""

    pieces: Pieces
    before: float
    after: float


def tune_scales(
    model: Any,
    spec: MoESpec,
    batches: Sequence[Batch],
    quantized: Pieces,
    step: Callable[[int], None] = lambda _: None,
) -> Tuned:
    """Tune the scales of `quantized` for one pass over the data.

    `model` is the original in memory, and is left as it was. `step(1)` is called after each batch. Layers that it does
    not build keep their scales.
    """
    model.requires_grad_(False)
    modules = {layer.layer: module for layer, module in model_layers(spec, model)}
    originals = [[p.detach().clone() for p in stored(module)] for module in modules.values()]
    pieces: dict[Place, list[Piece]] = {}
    absent = {place: parts for place, parts in quantized.items() if place[0] not in modules}  # multi-token prediction
    for place, parts in quantized.items():
        if place in absent:
            continue
        device = weights(modules[place[0]])[place[1]].device
        for members, q in parts:
            on_device = QWeight(
                q.codes.to(device), q.scales.to(device), None if q.zeros is None else q.zeros.to(device), q.format
            )
            moved = torch.zeros(q.scales.shape, device=device)
            pieces.setdefault(place, []).append(Piece(members, on_device, on_device.dequantize(), moved))
    flat = [piece for parts in pieces.values() for piece in parts]

    @torch.no_grad()
    def put_originals() -> None:
        for module, kept in zip(modules.values(), originals, strict=True):
            for parameter, w in zip(stored(module), kept, strict=True):
                parameter.copy_(w)

    @torch.no_grad()
    def put(value: Callable[[Piece], Tensor]) -> None:
        for (layer, projection), parts in pieces.items():
            w = weights(modules[layer])[projection]
            for piece in parts:
                w[piece.members] = value(piece).to(w.dtype)

    def divergence(batch: Batch, value: Callable[[Piece], Tensor]) -> Tensor:
        """KL(original || quantized), the mean over a batch's predicting positions."""
        put_originals()
        with torch.no_grad():
            said_SV = log_probabilities(model, batch)
        put(value)
        return (said_SV.exp() * (said_SV - log_probabilities(model, batch))).sum(-1).mean()

    shown, held = hold_back(batches)

    def held_back(value: Callable[[Piece], Tensor]) -> float:
        with torch.no_grad():
            means = [sum(float(divergence(batch, value)) for batch in kind) / len(kind) for kind in held]
        return sum(means) / len(means)

    before = held_back(lambda piece: piece.values)
    optimizer = torch.optim.Adam([piece.moved_MOG for piece in flat], lr=LEARNING_RATE, betas=BETAS)
    with differentiable(modules):
        steps = together(shown)
        for number, several in enumerate(steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * number / len(steps))) / 2
            for batch in several:
                (divergence(batch, Piece.now) / len(several)).backward()
                step(1)
            for place, gradient in gradients(modules):
                for piece in pieces.get(place, ()):
                    piece.take(gradient)
            optimizer.step()
    tuned = absent | {place: [(piece.members, piece.result()) for piece in parts] for place, parts in pieces.items()}
    after = held_back(lambda piece: piece.result().dequantize())
    put_originals()
    return Tuned(tuned, before, after)


def hold_back(batches: Sequence[Batch]) -> tuple[list[Batch], list[list[Batch]]]:
    """Those to learn from, in their order, and those to judge by, a list for each kind. Kinds of few batches are all
    learnt from; where that leaves none to judge by, all judge."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, batch in enumerate(batches):
        kinds.setdefault(("answer_mask" in batch, "image_mask" in batch), []).append(i)
    held = [at[HELD // 2 :: HELD] for at in kinds.values() if len(at) > HELD // 2]
    apart = {i for at in held for i in at}
    learnt = [batch for i, batch in enumerate(batches) if i not in apart]
    return learnt, [[batches[i] for i in at] for at in held or kinds.values()]


def together(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Batches by steps, of TOKENS or more but for the last."""
    steps: list[list[Batch]] = []
    tokens = TOKENS
    for batch in batches:
        if tokens >= TOKENS:
            steps.append([])
            tokens = 0
        steps[-1].append(batch)
        tokens += batch["input_ids"].numel()
    return steps


@contextmanager
def differentiable(modules: Mapping[int, Any]) -> Iterator[None]:
    """Within the block the experts' stored weights have gradients."""
    parameters = [p for module in modules.values() for p in stored(module)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def gradients(modules: Mapping[int, Any]) -> Iterator[tuple[Place, Tensor]]:
    """(place, [E, out, in]) of the last backward pass, which are then forgotten."""
    for layer, module in modules.items():
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in stored(module)]
        for projection, gradient in views(module, found).items():
            yield (layer, projection), gradient
        for parameter in stored(module):
            parameter.grad = None


def log_probabilities(model: Any, batch: Batch) -> Tensor:
    """[S, V] at the predicting positions, float32."""
    return predicting_logits(model, batch, next(model.parameters()).device).log_softmax(-1)
