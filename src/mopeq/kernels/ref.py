"""The reference kernel: every token, every choice, one dequantized expert at a time. Obvious before fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.seam import activate


def experts_forward(experts: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """out[t] = sum over the token's choices of weight * down(gate(x)); float64 inputs give float64 arithmetic.

    `experts` is a `QuantizedExperts`; expert indices outside 0 … E-1 contribute nothing.
    """
    out_TH = torch.zeros_like(x_TH)
    for t in range(x_TH.shape[0]):
        for k in range(index_TK.shape[1]):
            e = int(index_TK[t, k])
            if not 0 <= e < experts.num_experts:
                continue
            x = x_TH[t : t + 1]
            top = {p: one_linear(experts, e, p, x) for p in experts.projections if p != "down"}
            y = one_linear(experts, e, "down", activate(experts, top))
            if experts.has_post_expert_norm:
                y = experts.post_expert_norm(y)
            out_TH[t] += (y * weight_TK[t, k]).to(x_TH.dtype)[0]
    return out_TH


def one_linear(experts: Any, e: int, p: str, x: Tensor) -> Tensor:
    """x @ W.T + b for one projection of one expert, its weights dequantized in x's precision."""
    y = x @ experts.qweight(e, p).dequantize(x.dtype).T
    bias = experts.bias_of(p)
    return y if bias is None else y + bias[e].to(x.dtype)
