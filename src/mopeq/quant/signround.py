"""SignRound (arXiv 2309.05516): rounding and ranges learned by signed gradient descent.

    level = clip(round(x), -z, c - z),   q = level * s,      c = 2^b - 1

with x a weight in steps of its scale, held within half a step of where it began, and s a group's scale. Both are moved
by the sign of their gradient with a rate that falls linearly to nothing. The loss is the squared error of the outputs
on the expert's own routed inputs, |dW X|^2 = tr(dW H dW^T) with H = X X^T: the second moments hold all that the inputs
say, so a step costs no tokens. Rounding passes gradients straight through: dq/dx = s where not clipped, dq/ds = level.

The paper starts from whole ranges and takes 200 steps. Here ranges are searched first for the least rounding error
weighted by the inputs' own moments; 30 steps from there end below 200 from whole ranges. Each matrix keeps the best
point it saw, and round to nearest is one of them: the result is never worse than that on these inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.nouns import Format
from mopeq.quant.descent import Inputs, coded, part_of, slices, spread
from mopeq.quant.gptq import searched_range
from mopeq.quant.rtn import LARGEST, SMALLEST, stored_scale
from mopeq.quant.rtn import quantize as round_to_nearest
from mopeq.tensors import QWeight

STEPS = 30
SCALE_RATE = 1.0  # what the rate of x, in steps, is to the scale, as a share of it
CHUNK = 1 << 19  # weights tuned at a time on a CPU: small enough for the caches
CHUNK_DEVICE = 1 << 26


@torch.no_grad()
def quantize(w: Tensor, fmt: Format, moments: Tensor | Inputs | None = None, steps: int = STEPS, **_: Any) -> QWeight:
    """Matrices [E, out, in] with their inputs' second moments [E, in, in]; without moments, round to nearest."""
    if moments is None:
        return round_to_nearest(w, fmt)
    size = max(1, (CHUNK if w.device.type == "cpu" else CHUNK_DEVICE) // (w.shape[1] * w.shape[2]))
    return QWeight.join([tune(w[b].float(), fmt, part_of(moments, b), steps) for b in slices(len(w), size)])


def tune(w_ENC: Tensor, fmt: Format, inputs: Inputs, steps: int) -> QWeight:
    """One batch of matrices, worked on as [E, C, N]."""
    w, n, size = w_ENC.mT.contiguous(), w_ENC.shape[-1], fmt.group_size
    nearest = round_to_nearest(w_ENC, fmt)  # also refuses scales beyond fp16
    middle = torch.full_like(nearest.scales.float(), 2.0 ** (fmt.bits - 1))
    zero = (middle if nearest.zeros is None else nearest.zeros.float()).mT.contiguous()
    scale = nearest.scales.float().mT.contiguous()
    h = inputs.factors(size).h
    best = Best(nearest.codes.mT.float() - spread(zero, size, n), scale, zero, w, h, size)
    weight_EC = h.diagonal(dim1=-2, dim2=-1)
    found = [searched_range(w[:, group], weight_EC[:, group], fmt) for group in slices(n, size)]
    scale, zero = torch.stack([s for s, _ in found], 1), torch.stack([z for _, z in found], 1)
    z = spread(zero, size, n)
    low, high = -z, fmt.max_code - z
    x = w / spread(scale, size, n)
    least, most = x - 0.5, x + 0.5
    for step in range(steps + 1):
        rounded = x.round()
        level = torch.clamp(rounded, low, high)
        pull = best.see(level, scale, zero)
        if step == steps:
            break
        rate = (1 - step / steps) / steps
        by_scale = group_sum(pull * level, size)
        x.sub_(pull.mul_(rounded == level).sign_(), alpha=rate)
        torch.clamp(x, least, most, out=x)
        scale = stored_scale((scale * (1 - SCALE_RATE * rate * by_scale.sign())).clamp(SMALLEST, LARGEST))
    return coded(best.level, best.scale, best.zero, fmt)


class Best:
    """For each matrix of a batch the levels [E, C, N], scales and zero points [E, G, N] of the least loss seen."""

    def __init__(self, level: Tensor, scale: Tensor, zero: Tensor, w: Tensor, h: Tensor, group_size: int):
        self.w, self.h, self.group_size = w, h, group_size
        self.level, self.scale, self.zero = level.clone(), scale.clone(), zero.clone()
        self.least_E = torch.full((len(w),), float("inf"), dtype=w.dtype, device=w.device)
        self.see(level, scale, zero)

    def see(self, level: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Keep a point where it is better; returns half the loss's gradient at its dequantized weights."""
        away = (level * spread(scale, self.group_size, self.w.shape[1])).sub_(self.w)
        pull = torch.bmm(self.h, away)
        loss_E = away.mul_(pull).flatten(1).sum(1)
        better = loss_E < self.least_E
        if bool(better.any()):
            self.least_E = torch.where(better, loss_E, self.least_E)
            self.level[better], self.scale[better], self.zero[better] = level[better], scale[better], zero[better]
        return pull


def group_sum(t_ECN: Tensor, group_size: int) -> Tensor:
    """[E, C, N] -> sums over each group [E, G, N]; the last group may be shorter."""
    whole = t_ECN.shape[1] // group_size * group_size
    parts = [t_ECN[:, :whole].unflatten(1, (-1, group_size)).sum(2)] if whole else []
    if whole < t_ECN.shape[1]:
        parts.append(t_ECN[:, whole:].sum(1, keepdim=True))
    return torch.cat(parts, 1)
