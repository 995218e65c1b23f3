"""GPTQ (arXiv 2210.17323): columns are rounded one after another, each error made good by the columns still to come.

With M the second moments of the inputs and U the upper Cholesky factor of M^-1, rounding column j with error e_j costs
(e_j / U_jj)^2 in outputs, and the best the later columns can do is to move by -(e_j / U_jj) U_j,later. Here all experts
of a layer go together. Scales and zero points are set beforehand, by a search over clipped ranges for the least error
weighted by each input's own moment; columns then go in order of falling moment (activation order), while groups stay
where they are on disk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.nouns import Format
from mopeq.quant.rtn import grouped, scale_and_zero
from mopeq.quant.rtn import quantize as round_to_nearest
from mopeq.tensors import QWeight, per_input

DAMPING = 0.01  # of the mean of M's diagonal, added to it
BLOCK = 64  # columns whose errors are passed on to the rest in one product
CLIPS = tuple(1 - i / 40 for i in range(24))  # ranges tried: the whole one down to 0.425 of it
CHUNK = 1 << 24  # weights at a time


def quantize(w: Tensor, fmt: Format, moments: Tensor | None = None, **_: Any) -> QWeight:
    """Matrices [E, out, in] with their inputs' second moments [E, in, in]; without moments, round to nearest."""
    if moments is None:
        return round_to_nearest(w, fmt)
    size = max(1, CHUNK // (w.shape[1] * w.shape[2]))
    parts = [solve(w[a : a + size].float(), fmt, moments[a : a + size].float()) for a in range(0, len(w), size)]
    return QWeight.join(parts)


def solve(w_ENC: Tensor, fmt: Format, m_ECC: Tensor) -> QWeight:
    """GPTQ of a batch of matrices."""
    n = w_ENC.shape[-1]
    diagonal_EC = m_ECC.diagonal(dim1=-2, dim2=-1)
    scale, zero = searched_range(w_ENC, fmt, diagonal_EC)
    s_ENC, z_ENC = per_input(scale, fmt.group_size, n), per_input(zero, fmt.group_size, n)
    order_EC = torch.argsort(diagonal_EC, dim=-1, descending=True, stable=True)
    w, s, z = (gather_columns(t, order_EC) for t in (w_ENC, s_ENC, z_ENC))
    u = inverse_factor(gather_columns(gather_columns(m_ECC, order_EC).mT, order_EC).mT)
    w = w.clone()
    codes = torch.empty_like(w)
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        errors = torch.empty_like(w[..., first:last])
        for j in range(first, last):
            code = ((w[..., j] / s[..., j]).round() + z[..., j]).clamp_(0, fmt.max_code)
            codes[..., j] = code
            error = (w[..., j] - (code - z[..., j]) * s[..., j]) / u[:, j, j, None]
            errors[..., j - first] = error
            w[..., j + 1 : last] -= error.unsqueeze(-1) * u[:, None, j, j + 1 : last]
        w[..., last:] -= errors @ u[:, first:last, last:]
    codes = torch.empty_like(codes).scatter_(-1, order_EC[:, None].expand_as(codes), codes)
    return QWeight(codes.to(torch.uint8), scale.half(), None if fmt.scheme == "s" else zero.to(torch.uint8), fmt)


def gather_columns(t: Tensor, order_EC: Tensor) -> Tensor:
    """Each matrix's columns in its own order."""
    return t.gather(-1, order_EC[:, None].expand_as(t))


def inverse_factor(m_ECC: Tensor) -> Tensor:
    """U with U^T U = (M + damping)^-1, upper triangular; inputs that never were are given the damping alone."""
    n = m_ECC.shape[-1]
    mean_E = m_ECC.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean_E = torch.where(mean_E > 0, mean_E, torch.ones_like(mean_E))
    eye = torch.eye(n, dtype=m_ECC.dtype, device=m_ECC.device)
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):  # float32 moments of few tokens may need more
        lower, info = torch.linalg.cholesky_ex(m_ECC + damping * mean_E[:, None, None] * eye)
        if not bool(info.any()):
            break
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    assert not bool(info.any()), "damped moments are positive definite"
    return upper


def searched_range(w: Tensor, fmt: Format, weight_EC: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point [E, out, groups] of the clipped range with the least weighted rounding error.

    Where an expert's inputs were never seen, all inputs weigh alike.
    """
    x = grouped(w, fmt.group_size)
    weight_EC = torch.where(weight_EC.sum(-1, keepdim=True) > 0, weight_EC, torch.ones_like(weight_EC))
    weight = grouped(weight_EC[:, None], fmt.group_size)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    best_scale, best_zero = scale_and_zero(low, high, fmt)
    least = torch.full_like(low, float("inf"))
    for clip in CLIPS:
        scale, zero = scale_and_zero(low * clip, high * clip, fmt)
        s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
        q = (((x / s).round() + z).clamp(0, fmt.max_code) - z) * s
        loss = ((q - x).square() * weight).sum(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero
