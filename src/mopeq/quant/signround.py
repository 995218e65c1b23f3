"""SignRound (arXiv 2309.05516): rounding offsets and clipping learned by signed gradient descent.

    codes = clip(round(W / s + V) + z, 0, c),   s = (hi * max(W) - lo * min(W)) / c,   z = round(-lo * min(W) / s)

with c = 2^b - 1, V in [-1/2, 1/2] a weight and lo, hi in [0, 1] a group, all moved by the sign of their gradient with
a rate that falls linearly. The loss is the squared error of the outputs on the expert's own routed inputs,
|dW X|^2 = tr(dW M dW^T) with M = X X^T: the second moments hold all that the inputs say, so a step costs no tokens.
The best point seen is kept; the first is round-to-nearest, so the result is never worse than it on these inputs.

Rounding passes gradients straight through, which leaves so little calculus that it is written out here (with `in`
marking codes that were not clipped): dq/dV = s in, dq/ds = q/s - in W/s, dq/dz = -s (1 - in).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mopeq.nouns import Format
from mopeq.quant.rtn import LARGEST, SMALLEST, grouped
from mopeq.quant.rtn import quantize as round_to_nearest
from mopeq.tensors import QWeight

STEPS = 200
CHUNK = 1 << 20  # weights tuned at a time: small enough for the caches


def quantize(w: Tensor, fmt: Format, moments: Tensor | None = None, steps: int = STEPS, **_: Any) -> QWeight:
    """Matrices [E, out, in] with their inputs' second moments [E, in, in]; without moments, round to nearest."""
    if moments is None:
        return round_to_nearest(w, fmt)
    size = max(1, CHUNK // (w.shape[1] * w.shape[2])) if w.device.type == "cpu" else len(w)
    parts = [tune(w[a : a + size].float(), fmt, moments[a : a + size], steps) for a in range(0, len(w), size)]
    return QWeight.join(parts)


def tune(w: Tensor, fmt: Format, moments: Tensor, steps: int) -> QWeight:
    """SignRound of a batch of matrices (one whose moments are all zero stays at round-to-nearest)."""
    n, symmetric = w.shape[-1], fmt.scheme == "s"
    start = round_to_nearest(w, fmt)  # also refuses scales beyond fp16
    m = pad(moments.to(w.dtype), (0, -n % fmt.group_size, 0, -n % fmt.group_size))  # padded inputs are always zero
    x = grouped(w, fmt.group_size)  # [E, out, G, g]; everything below keeps this shape
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    offset, lo, hi = torch.zeros_like(x), torch.ones_like(low), torch.ones_like(high)
    codes = pad(start.codes, (0, -n % fmt.group_size)).unflatten(-1, (-1, fmt.group_size)).clone()
    scales = start.scales.float().unsqueeze(-1).clone()
    zeros = torch.full_like(scales, 2.0 ** (fmt.bits - 1)) if symmetric else start.zeros.float().unsqueeze(-1).clone()  # type: ignore[union-attr]
    least_E = torch.full((len(w),), float("inf"), dtype=w.dtype, device=w.device)
    for step in range(steps + 1):
        s, z, ds_lo, ds_hi, dz_lo, dz_hi = scale_and_slopes(low, high, lo, hi, fmt)
        raw = (x / s).add_(offset).round_().add_(z)
        code = raw.clamp(0, fmt.max_code)
        inside = raw.eq_(code)  # 1 where not clipped
        q = (code - z).mul_(s)
        error = q - x
        pull = torch.bmm(error.flatten(2), m).unflatten(-1, x.shape[-2:])  # half the loss's gradient for q
        loss_E = (error * pull).flatten(1).sum(1)
        better = loss_E < least_E
        if bool(better.any()):
            least_E = torch.where(better, loss_E, least_E)
            codes[better], scales[better], zeros[better] = code[better].to(torch.uint8), s[better], z[better]
        if step == steps:
            break
        by_s = (pull * (q - inside * x)).sum(-1, keepdim=True) / s
        by_z = (pull * (inside - 1)).sum(-1, keepdim=True) * s
        rate = (1 - step / steps) / steps
        offset.sub_(rate * (pull * inside).sign_()).clamp_(-0.5, 0.5)
        lo.sub_(rate * (by_s * ds_lo + by_z * dz_lo).sign_()).clamp_(0, 1)
        hi.sub_(rate * (by_s * ds_hi + by_z * dz_hi).sign_()).clamp_(0, 1)
    codes = codes.flatten(-2)[..., :n].contiguous()
    zero_codes = None if symmetric else zeros.squeeze(-1).to(torch.uint8)
    return QWeight(codes, scales.squeeze(-1).half(), zero_codes, fmt)


def scale_and_slopes(low: Tensor, high: Tensor, lo: Tensor, hi: Tensor, fmt: Format) -> tuple[Tensor, ...]:
    """Stored scale and zero point of clipped groups, then ds/dlo, ds/dhi, dz/dlo, dz/dhi of the exact ones."""
    nothing = torch.zeros_like(low)
    if fmt.scheme == "s":
        below, above = -low / 2 ** (fmt.bits - 1), high / max(2 ** (fmt.bits - 1) - 1, 1)
        exact = torch.maximum(lo * below, hi * above)
        s = exact.clamp(SMALLEST, LARGEST).half().float().clamp_min(SMALLEST)
        rules = lo * below >= hi * above
        zero = torch.full_like(s, 2.0 ** (fmt.bits - 1))
        return s, zero, torch.where(rules, below, nothing), torch.where(rules, nothing, above), nothing, nothing
    exact = ((hi * high - lo * low) / fmt.max_code).clamp(SMALLEST, LARGEST)
    s = exact.half().float().clamp_min(SMALLEST)
    z = (-lo * low / s).round().clamp(0, fmt.max_code)
    ds_lo, ds_hi = -low / fmt.max_code, high / fmt.max_code
    turn = lo * low / s**2
    return s, z, ds_lo, ds_hi, -low / s + turn * ds_lo, turn * ds_hi
