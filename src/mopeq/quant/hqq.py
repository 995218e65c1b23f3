"""HQQ (half-quadratic quantization; Badri and Shaji, 2023): ranges that forgive outliers, found without data.

Least squares lets a few large weights stretch a group's range for all. HQQ minimises sum |W - Q|^p with p < 1 instead,
by splitting off a sparse part R: codes of W in the present range; R = shrink(W - Q), which keeps only what is far off;
then the range that fits W - R best, where the large errors no longer pull. The published method moves the zero point
alone, as a fraction; zero points are integers here, so the scale is fitted too (least squares, given codes and zero).
Each group keeps the best range it saw; the first is round to nearest's, so sum |W - Q|^p is never worse than that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.nouns import Format
from mopeq.quant.rtn import LARGEST, SMALLEST, encode, grouped, scale_and_zero, stored_scale
from mopeq.tensors import QWeight

NORM = 0.5  # p
STEPS = 20
BETA, GROWTH = 0.5, 1.01  # how near R must come to W - Q, and its growth a step; errors in units of the first scale
CHUNK = 1 << 18  # weights at a time: small enough for the caches


@torch.no_grad()
def quantize(w: Tensor, fmt: Format, **_: Any) -> QWeight:
    """Matrices [..., out, in]; needs no data. BadInput where a scale leaves fp16's range."""
    rows = w.float().reshape(-1, w.shape[-1])
    size = max(1, CHUNK // w.shape[-1])
    found = [fitted_range(grouped(rows[a : a + size], fmt.group_size), fmt) for a in range(0, len(rows), size)]
    scale, zero = (torch.cat(parts).reshape(*w.shape[:-1], -1) for parts in zip(*found, strict=True))
    return encode(w.float(), scale, zero, fmt)


def fitted_range(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point [R, G] of groups x [R, G, g]; zeros that fill a short last group cost nothing."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    best_scale, best_zero = unit, _ = scale_and_zero(low, high, fmt)
    least = torch.full_like(unit, float("inf"))

    def look(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a range where it is better; levels and what they miss, in units of the whole range's scale."""
        nonlocal best_scale, best_zero, least
        level = torch.clamp((x / scale).round_(), -zero, fmt.max_code - zero)
        away = (x - level * scale).div_(unit)
        loss = away.abs().pow_(NORM).sum(-1, keepdim=True)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        return level, away

    scale, zero, beta = best_scale, best_zero, BETA
    for _ in range(STEPS):
        level, away = look(scale, zero)
        fit = x - shrink(away, beta) * unit
        if fmt.scheme == "a":
            code = level + zero
            zero = (code - fit / scale).mean(-1, keepdim=True).round_().clamp_(0, fmt.max_code)
            level = code - zero
        energy = level.square().sum(-1, keepdim=True)
        found = stored_scale(((level * fit).sum(-1, keepdim=True) / energy).clamp(SMALLEST, LARGEST))
        scale = torch.where(energy > 0, found, scale)
        beta *= GROWTH
    look(scale, zero)
    return best_scale.squeeze(-1), best_zero.squeeze(-1)


def shrink(error: Tensor, beta: float) -> Tensor:
    """The R that minimises |R|^p + beta/2 (R - error)^2, by its usual closed approximation (generalised shrinkage)."""
    size = error.abs()
    return error.sign() * (size - (NORM / beta) * size.clamp_min(1e-8).pow(NORM - 1)).clamp_min_(0)
