"""GPTQ as it is usually done, to be measured against: a group's range is chosen beforehand, for least squared rounding
error, then columns are rounded in activation order with feedback (arXiv 2210.17323); 1 % damping, nothing after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.nouns import Format
from mopeq.quant.descent import factored, slices, spread, take
from mopeq.quant.gptq import batches, round_group, searched_range
from mopeq.tensors import QWeight


@torch.no_grad()
def quantize(w: Tensor, fmt: Format, moments: Tensor, **_: Any) -> QWeight:
    """Matrices [E, out, in] with their inputs' second moments [E, in, in]."""
    return QWeight.join([solve(w[b].float(), fmt, moments[b].float()) for b in batches(w)])


def solve(w_ENC: Tensor, fmt: Format, moments_ECC: Tensor) -> QWeight:
    w = w_ENC.mT.contiguous()
    n, size = w.shape[1], fmt.group_size
    ranges = [searched_range(w[:, g], torch.ones_like(w[:, g, 0]), fmt) for g in slices(n, size)]
    scale, zero = (torch.stack([r[i] for r in ranges], 1) for i in (0, 1))
    found = factored(moments_ECC, size)
    mt, v, order = found.mt, found.v, found.order
    wo = take(w, order)
    wrong, level = torch.zeros_like(wo), torch.empty_like(wo)
    for part in slices(n, size):
        target = wo[:, part]
        if part.start:
            target = torch.baddbmm(target, mt[:, part, : part.start], wrong[:, : part.start])
        place = (order[:, part.start] // size)[:, None, None].expand(-1, 1, w.shape[-1])
        s, z = scale.gather(1, place), zero.gather(1, place)
        round_group(target, wo[:, part], mt[:, part, part], v[:, part], s, z, fmt, level[:, part], wrong[:, part])
    level = torch.empty_like(level).scatter_(1, order[..., None].expand_as(level), level)
    codes = (level + spread(zero, size, n)).to(torch.uint8)
    zeros = None if fmt.scheme == "s" else zero.mT.contiguous().to(torch.uint8)
    return QWeight(codes.mT.contiguous(), scale.mT.contiguous().half(), zeros, fmt)
