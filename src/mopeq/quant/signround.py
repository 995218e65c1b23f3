"""SignRound (arXiv 2309.05516): rounding offsets and clipping learned by signed gradient descent.

    codes = clip(round(W / s + V) + z, 0, 2^b - 1),   s = (hi * max(W) - lo * min(W)) / (2^b - 1)

with V in [-1/2, 1/2] a weight and lo, hi in [0, 1] a group, all moved by the sign of their gradient with a rate that
falls linearly. The loss is the squared error of the outputs on the expert's own routed inputs,
|dW X|^2 = tr(dW M dW^T) with M = X X^T: the second moments hold all that the inputs say, so a step costs no tokens.
The best point seen is kept; the first is round-to-nearest, so the result is never worse than it on these inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.nouns import Format
from mopeq.quant.rtn import LARGEST, SMALLEST, grouped
from mopeq.quant.rtn import quantize as round_to_nearest
from mopeq.tensors import QWeight, per_input

STEPS = 200
RATE = 1.0 / STEPS
CHUNK = 1 << 24  # weights tuned at a time


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The rounded value, with the exact value's gradient."""
    return exact + (rounded - exact).detach()


def quantize(w: Tensor, fmt: Format, moments: Tensor | None = None, steps: int = STEPS, **_: Any) -> QWeight:
    """Matrices [E, out, in] with their inputs' second moments [E, in, in]; without moments, round to nearest."""
    if moments is None:
        return round_to_nearest(w, fmt)
    size = max(1, CHUNK // (w.shape[1] * w.shape[2]))
    parts = [tune(w[a : a + size].float(), fmt, moments[a : a + size], steps) for a in range(0, len(w), size)]
    zeros = None if parts[0].zeros is None else torch.cat([q.zeros for q in parts if q.zeros is not None])
    return QWeight(torch.cat([q.codes for q in parts]), torch.cat([q.scales for q in parts]), zeros, fmt)


def tune(w: Tensor, fmt: Format, moments: Tensor, steps: int) -> QWeight:
    """SignRound of a batch of matrices that all have inputs (an all-zero M leaves its matrix at round-to-nearest)."""
    best = round_to_nearest(w, fmt)  # also refuses scales beyond fp16
    n = w.shape[-1]
    m = moments.to(w.dtype)
    groups = grouped(w, fmt.group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    offset = torch.zeros_like(w, requires_grad=True)
    lo = torch.ones_like(low, requires_grad=True)
    hi = torch.ones_like(high, requires_grad=True)
    codes, scales = best.codes.clone(), best.scales.clone()
    zeros = None if best.zeros is None else best.zeros.clone()
    least_E = torch.full((len(w),), float("inf"), dtype=w.dtype, device=w.device)
    for step in range(steps + 1):
        scale, zero = tuned_scale_and_zero(low * lo, high * hi, fmt)
        s, z = per_input(scale, fmt.group_size, n), per_input(zero, fmt.group_size, n)
        steps_ = w / s + offset
        code = (straight_through(steps_, steps_.round()) + z).clamp(0, fmt.max_code)
        q = (code - z) * s
        error = (q - w).detach()
        pull = error @ m
        loss_E = (error * pull).sum((1, 2))
        better = loss_E < least_E
        if bool(better.any()):
            least_E = torch.where(better, loss_E, least_E)
            codes[better], scales[better] = code.detach()[better].round().to(torch.uint8), scale.detach()[better].half()
            if zeros is not None:
                zeros[better] = zero.detach()[better].to(torch.uint8)
        if step == steps:
            break
        for tensor, gradient in zip((offset, lo, hi), torch.autograd.grad(q, (offset, lo, hi), 2 * pull), strict=True):
            with torch.no_grad():
                tensor -= RATE * (STEPS / steps) * (1 - step / steps) * gradient.sign()
        with torch.no_grad():
            offset.clamp_(-0.5, 0.5)
            lo.clamp_(0, 1)
            hi.clamp_(0, 1)
    return QWeight(codes, scales, zeros, fmt)


def tuned_scale_and_zero(low: Tensor, high: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """As rtn.scale_and_zero, differentiable: the stored (fp16, integer) values with the exact ones' gradients."""
    if fmt.scheme == "s":
        scale = torch.maximum(-low / 2 ** (fmt.bits - 1), high / max(2 ** (fmt.bits - 1) - 1, 1))
    else:
        scale = (high - low) / fmt.max_code
    scale = scale.clamp(SMALLEST, LARGEST)
    scale = straight_through(scale, scale.half().float().clamp_min(SMALLEST))
    if fmt.scheme == "s":
        return scale, torch.full_like(scale, 2.0 ** (fmt.bits - 1))
    zero = -low / scale
    return scale, straight_through(zero, zero.round().clamp(0, fmt.max_code))
