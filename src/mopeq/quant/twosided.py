"""GPTQ's result refined by what the loss feels: coordinate descent on tr(G D H D^T), D = Q - W.

H are the second moments of a matrix's inputs, G those of the loss's gradients at its outputs. To second order, and
with the two taken as independent, that is the loss's increase (the Kronecker-factored Fisher of arXiv 1503.05671);
tr(D H D^T), which gptq lowers, takes every output for as dear as any other and errors of different outputs for
unrelated.

Outputs are taken a few at a time, with all others held. Within such a block G is replaced by the diagonal of its
absolute row sums, which is never less: so each step is a descent of gptq's own kind, toward weights that are moved to
make good what the other outputs get wrong, and no step raises tr(G D H D^T).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.nouns import Format
from mopeq.quant import gptq
from mopeq.quant.descent import coded, damped, descend, of_mean_one, slices, spread
from mopeq.tensors import QWeight

OUTPUTS = 8  # of a matrix, moved at a time: fewer follow G more closely and take longer
ROUNDS = 2  # over all outputs


@torch.no_grad()
def quantize(
    w: Tensor, fmt: Format, moments: Tensor | None = None, gradients: Tensor | None = None, **_: Any
) -> QWeight:
    """Matrices [E, out, in] with moments of inputs [E, in, in] and of gradients at outputs [E, out, out].

    Without gradients, as gptq. BadInput where a scale leaves fp16's range.
    """
    found = gptq.quantize(w, fmt, moments=moments)
    if moments is None or gradients is None:
        return found
    parts = gptq.batches(w)
    return QWeight.join([refine(w[b].float(), found[b], moments[b].float(), gradients[b].float()) for b in parts])


def refine(w_ENC: Tensor, q: QWeight, moments_ECC: Tensor, gradients_ENN: Tensor) -> QWeight:
    """A batch of quantized matrices at lower tr(G D H D^T)."""
    w, h, g = w_ENC.mT.contiguous(), damped(*of_mean_one(moments_ECC)), damped(*of_mean_one(gradients_ENN))
    fmt, n, size = q.format, w.shape[1], q.format.group_size
    scale = q.scales.float().mT.contiguous()
    zero = torch.full_like(scale, 2 ** (fmt.bits - 1)) if q.zeros is None else q.zeros.float().mT.contiguous()
    level = q.codes.float().mT - spread(zero, size, n)
    away = level * spread(scale, size, n) - w
    for _ in range(ROUNDS):
        for part in slices(w.shape[2], OUTPUTS):
            x, s, z = level[..., part], scale[..., part], zero[..., part]
            bound_EN = g[:, part, part].abs().sum(-1)
            target = x * spread(s, size, n) - torch.bmm(away, g[..., part]) / bound_EN[:, None]
            x, s = descend(target, fmt, h, x, s, z, 1)
            level[..., part], scale[..., part] = x, s
            away[..., part] = x * spread(s, size, n) - w[..., part]
    return coded(level, scale, zero, fmt)
