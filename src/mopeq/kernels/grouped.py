"""Plain torch, any device: tokens sorted by expert, codes unpacked once per width tier, only for chosen experts.

What is dequantized at a time is bounded (`CHUNK` weights), so a layer is never materialised. Reads the counts back
to the host, so it is no path for CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.seam import activate

CHUNK = 1 << 23  # weights dequantized at a time: 32 MB in float32


def experts_forward(experts: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' function of x_TH [T, H] for index_TK and weight_TK [T, K]; see kernels.ref for the meaning."""
    tokens, k = index_TK.shape
    ids_S, order_S = torch.sort(index_TK.flatten(), stable=True)
    mine_S = (ids_S >= 0) & (ids_S < experts.num_experts)
    ids_S, order_S = ids_S[mine_S], order_S[mine_S]
    counts = torch.bincount(ids_S, minlength=experts.num_experts).tolist()
    starts, at = [], 0
    for count in counts:
        starts.append(at)
        at += count
    spans = {e: (starts[e], starts[e] + count) for e, count in enumerate(counts) if count}
    x_SH = x_TH[order_S // k]
    top = {p: grouped_linear(experts, p, x_SH, ids_S, spans) for p in experts.projections if p != "down"}
    y_SH = grouped_linear(experts, "down", activate(experts, top), ids_S, spans)
    if experts.has_post_expert_norm:
        y_SH = experts.post_expert_norm(y_SH)
    y_SH = y_SH * weight_TK.flatten()[order_S].unsqueeze(-1)
    # put back in the tokens' order and summed there: the same sum whatever the batch, unlike atomic adds
    out = y_SH.new_zeros(tokens * k, y_SH.shape[-1])
    out[order_S] = y_SH
    return out.view(tokens, k, out.shape[1]).sum(1).to(x_TH.dtype)


def grouped_linear(experts: Any, p: str, x_SN: Tensor, ids_S: Tensor, spans: dict[int, tuple[int, int]]) -> Tensor:
    """Rows of x sorted by expert, each span times its expert's dequantized matrix: [S, in] -> [S, out]."""
    out_features, in_features = experts.shapes[p]
    y = x_SN.new_empty(x_SN.shape[0], out_features)
    step = max(1, CHUNK // (out_features * in_features))
    for tier in experts.tiers(p):
        chosen = [e for e in tier.rows if e in spans]
        for first in range(0, len(chosen), step):
            part = chosen[first : first + step]
            w_ENC = tier.dequantize(part, x_SN.dtype)
            for i, e in enumerate(part):
                a, b = spans[e]
                y[a:b] = x_SN[a:b] @ w_ENC[i].T
    bias = experts.bias_of(p)
    return y if bias is None else y + bias[ids_S].to(y.dtype)


def linear(matrix: Any, x: Tensor) -> Tensor:
    """x [..., in] times one packed matrix's transpose -> [..., out], some of its rows dequantized at a time."""
    step = max(1, CHUNK // matrix.in_features)
    chunks = [slice(at, at + step) for at in range(0, matrix.out_features, step)]
    parts = [x @ matrix.rows(chunk, x.dtype).T for chunk in chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
