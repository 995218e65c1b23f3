"""Moments made fit to work with, and coordinate descent on what a matrix costs in outputs, tr(D H D^T) with D = Q - W.

Batches of matrices are [E, C, N] here, inputs before outputs: a column of weights is then contiguous. `level` is
code - zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mopeq.nouns import Format
from mopeq.quant import compiled
from mopeq.quant.compiled import Factors
from mopeq.quant.rtn import LARGEST, SMALLEST, stored_scale
from mopeq.tensors import QWeight, per_input

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 16  # columns whose changes are passed on in one product


def spread(values_EGN: Tensor, group_size: int, n: int) -> Tensor:
    """Values of each group [E, G, N] for each of its inputs [E, C, N]."""
    return per_input(values_EGN.mT, group_size, n).mT


def coded(level: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> QWeight:
    """Levels [E, C, N], scales and zero points [E, G, N] as they are stored; the levels turn into codes in place."""
    for g, part in enumerate(slices(level.shape[1], fmt.group_size)):
        level[:, part] += zero[:, g, None]
    return stored(level.to(torch.uint8).mT.contiguous(), scale, zero, fmt)


def stored(codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> QWeight:
    """Codes [E, N, C] with scales and zero points [E, G, N]."""
    zeros = None if fmt.scheme == "s" else zero.mT.contiguous().to(torch.uint8)
    return QWeight(codes, scale.mT.contiguous().half(), zeros, fmt)


def slices(n: int, size: int) -> list[slice]:
    """0 … n in pieces of `size`, the last one shorter."""
    return [slice(a, min(a + size, n)) for a in range(0, n, size)]


# ------------------------------------------------------------------------------------------------ moments


@dataclass
class Inputs:
    """The second moments [E, C, C] of some matrices' inputs. What is made of them is kept as long as this is: widths,
    and matrices that share their inputs, share it."""

    moments: Tensor
    made: dict[int, Factors] = field(default_factory=dict)  # by group size
    parts: dict[tuple[int, int], Inputs] = field(default_factory=dict)

    def part(self, some: slice) -> Inputs:
        """Those of some of the matrices."""
        return self.parts.setdefault((some.start, some.stop), Inputs(self.moments[some]))

    def factors(self, group_size: int) -> Factors:
        if group_size not in self.made:
            self.made[group_size] = factored(self.moments.float(), group_size)
        return self.made[group_size]


def part_of(moments: Tensor | Inputs, some: slice) -> Inputs:
    """Those of some of the matrices; of a tensor, which nobody shares, nothing is kept."""
    return moments.part(some) if isinstance(moments, Inputs) else Inputs(moments[some])


def factored(moments_ECC: Tensor, group_size: int) -> Factors:
    """Damping grows tenfold where float32 moments of few tokens need it. NaN moments count as never seen."""
    diagonal_EC = moments_ECC.diagonal(dim1=-2, dim2=-1)
    order = column_order(diagonal_EC.where(diagonal_EC.isfinite(), 0.0), group_size)
    damping_E = moments_ECC.new_full((len(moments_ECC),), DAMPING)
    while True:
        here = compiled.factors_usable(moments_ECC)
        failed_E, found = (compiled.factors_of if here else factors_of)(moments_ECC, order, damping_E, group_size)
        if not bool(failed_E.any()):
            return found
        damping_E = torch.where(failed_E > 0, 10 * damping_E, damping_E)


def factors_of(moments_ECC: Tensor, order_EC: Tensor, damping_E: Tensor, group_size: int) -> tuple[Tensor, Factors]:
    """`factored` with this damping, and which failed [E]."""
    h = damped(*of_mean_one(moments_ECC, damping_E))
    ordered = torch.stack([h_CC.index_select(0, i).index_select(1, i) for h_CC, i in zip(h, order_EC, strict=True)])
    # the lower factor from the last column to the first is an upper factor from the first to the last
    lower, failed_E = torch.linalg.cholesky_ex(ordered.flip(-1, -2))
    upper_t = lower.mT.flip(-1, -2)
    root = upper_t.diagonal(dim1=-2, dim2=-1)
    return failed_E, Factors(h, upper_t / root[..., None], root.square(), order_EC)


def of_mean_one(moments_ECC: Tensor, damping_E: Tensor | float = DAMPING) -> tuple[Tensor, Tensor]:
    """Moments with a diagonal of mean one, of a size that float32 likes whatever the tokens were, and the damping
    [E] they are given; zeros to be damped by one, so to the identity, for those never seen."""
    mean_E = moments_ECC.diagonal(dim1=-2, dim2=-1).mean(-1, dtype=torch.float64).to(moments_ECC.dtype)
    seen_E = (mean_E > 0) & moments_ECC.flatten(1).isfinite().all(1)
    h = torch.where(seen_E[:, None, None], moments_ECC / torch.where(seen_E, mean_E, 1.0)[:, None, None], 0.0)
    return h, torch.where(seen_E, damping_E, 1.0)


def damped(h_ECC: Tensor, damping_E: Tensor) -> Tensor:
    return h_ECC + damping_E[:, None, None] * torch.eye(h_ECC.shape[-1], dtype=h_ECC.dtype, device=h_ECC.device)


def column_order(diagonal_EC: Tensor, group_size: int) -> Tensor:
    """Groups by falling mean of their moments, columns within a group by falling moment; a short last group last."""
    experts, n = diagonal_EC.shape
    group_C = torch.arange(n, device=diagonal_EC.device) // group_size
    mean_EG = diagonal_EC.new_zeros(experts, int(group_C[-1]) + 1).index_add_(1, group_C, diagonal_EC)
    if n % group_size:
        mean_EG[:, -1] = -1
    place_EG = torch.argsort(torch.argsort(mean_EG, dim=1, descending=True, stable=True), dim=1)
    falling_EC = torch.argsort(diagonal_EC, dim=1, descending=True, stable=True)
    return falling_EC.gather(1, torch.argsort(place_EG.gather(1, group_C[falling_EC]), dim=1, stable=True))


def take(t_ECN: Tensor, order_EC: Tensor) -> Tensor:
    """Each matrix's rows in its own order."""
    return t_ECN.gather(1, order_EC[..., None].expand(-1, -1, t_ECN.shape[-1]))


# --------------------------------------------------------------------------------------- coordinate descent


def descend(
    w: Tensor,
    fmt: Format,
    h: Tensor,
    level: Tensor,
    scale: Tensor,
    zero: Tensor,
    sweeps: int,
    half_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower tr(D H D^T) by moving every code, then every scale, to its best with all others held; `sweeps` times."""
    if compiled.usable(w):
        return compiled.descend(w, fmt, h, level, scale, zero, sweeps, half_h)
    n, size = w.shape[1], fmt.group_size
    level, scale = level.clone(), scale.clone()
    away = level * spread(scale, size, n) - w
    inverse = 1 / h.diagonal(dim1=-2, dim2=-1)
    for _ in range(sweeps):
        for g, group in enumerate(slices(n, size)):
            x, hg, z = level[:, group], h[:, group, group], zero[:, g]
            pull = torch.bmm(h[:, group], away)  # half the gradient
            s = best_scale(x, pull, hg, scale[:, g])
            move_codes(x, pull, hg, inverse[:, group], s, z, fmt)
            s = best_scale(x, pull, hg, s)
            scale[:, g] = s
            torch.sub(x * s[:, None], w[:, group], out=away[:, group])
    return level, scale


def best_scale(x: Tensor, pull: Tensor, h: Tensor, s: Tensor) -> Tensor:
    """A group's scale [E, N] of least squares given its levels x [E, g, N]; `pull` [E, g, N] follows in place."""
    hx = torch.bmm(h, x)
    curve, slope = (x * hx).sum(1), (x * pull).sum(1)
    found = stored_scale((s - slope / curve).clamp(SMALLEST, LARGEST))
    # kept where nothing is known of it, or where fp16's rounding would undo the gain
    gain = 2 * slope * (found - s) + curve * (found - s).square()
    found = torch.where((curve > 0) & (gain < 0), found, s)
    pull.addcmul_(hx, (found - s)[:, None])
    return found


def move_codes(x: Tensor, pull: Tensor, h: Tensor, inverse: Tensor, s: Tensor, z: Tensor, fmt: Format) -> None:
    """A group's columns, one after another, to their best levels; x and pull [E, g, N] follow in place."""
    low, high, step = -z, fmt.max_code - z, 1 / s
    for block in slices(x.shape[1], BLOCK):
        first = block.start
        moved = torch.empty_like(x[:, block])
        for j in range(first, block.stop):
            pulled = pull[:, j, None]
            if j > first:
                pulled = torch.baddbmm(pulled, h[:, None, j, first:j], moved[:, : j - first])
            best = torch.addcmul(x[:, j], pulled[:, 0] * inverse[:, j, None], step, value=-1).round_()
            torch.clamp(best, low, high, out=best)
            torch.mul(best - x[:, j], s, out=moved[:, j - first])
            x[:, j] = best
        pull.baddbmm_(h[:, :, block], moved)
