"""GPTQ (arXiv 2210.17323) made to choose its ranges as it goes, then refined by coordinate descent.

What a matrix costs in outputs is tr(D H D^T), with D = Q - W and H the second moments of its own inputs. Where
H = M diag(v) M^T, M unit upper triangular, that is sum_j v_j |((Q - W) M)_j|^2, so columns can be rounded one after
another, each to the code nearest to w_j + sum_{k<j} (w_k - q_k) M_kj: what earlier columns got wrong is made good by
the later ones.

1. Columns go group by group, an expert's most heavily used groups first (a short last group last), within a group by
   falling moment (activation order). So a group is rounded as a whole, and stays where it is on disk.
2. A group's range is chosen when its turn comes, for the weights with the feedback of all groups before: clipped
   ranges and zero points are tried by rounding alone, then a few scales around the best by rounding with feedback.
   Each row keeps its cheapest.
3. Coordinate descent: every code in turn moves to its best value with all others held, every scale to its least
   squares, a few times over. No step raises tr(D H D^T).

All matrices of a batch go together, as [E, C, N] (inputs before outputs: a column of weights is then contiguous).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.kernels.extent import largest
from mopeq.nouns import Format
from mopeq.quant import compiled
from mopeq.quant.compiled import Factors, Tried
from mopeq.quant.descent import BLOCK, Inputs, coded, descend, part_of, slices, stored, take
from mopeq.quant.rtn import LARGEST, scale_and_zero, stored_scale
from mopeq.quant.rtn import quantize as round_to_nearest
from mopeq.tensors import QWeight

SWEEPS = 2  # of coordinate descent over all codes and scales
CHUNK = 1 << 21  # weights at a time on a CPU: many enough that calls cost little
CHUNK_DEVICE = 1 << 26


@torch.no_grad()
def quantize(w: Tensor, fmt: Format, moments: Tensor | Inputs | None = None, sweeps: int = SWEEPS, **_: Any) -> QWeight:
    """Matrices [E, out, in] with their inputs' second moments [E, in, in]; without moments, round to nearest.

    Moments of zeros (inputs never seen) weigh all inputs alike. BadInput where a scale leaves fp16's range.
    """
    if moments is None:
        return round_to_nearest(w, fmt)
    return QWeight.join([solve(w[b].float(), fmt, part_of(moments, b), sweeps) for b in batches(w)])


def batches(w_ENC: Tensor) -> list[slice]:
    """The matrices that go together."""
    size = (CHUNK if w_ENC.device.type == "cpu" else CHUNK_DEVICE) // (w_ENC.shape[1] * w_ENC.shape[2])
    return slices(len(w_ENC), max(1, size))


def solve(w_ENC: Tensor, fmt: Format, inputs: Inputs, sweeps: int) -> QWeight:
    """One batch of matrices."""
    w = w_ENC.mT.contiguous()
    if not largest(w) <= LARGEST / 2:  # else no range can be too wide, whatever the format
        scale_and_zero(w.amin(1).clamp(max=0), w.amax(1).clamp(min=0), fmt)  # refuses what no fp16 scale can express
    found = inputs.factors(fmt.group_size)
    if compiled.usable(w):
        return stored(*compiled.solve(w, fmt, found, tried(fmt), sweeps), fmt)
    level, scale, zero = feed_back(w, fmt, found)
    level, scale = descend(w, fmt, found.h, level, scale, zero, sweeps)
    return coded(level, scale, zero, fmt)


# ----------------------------------------------------------------------------------- rounding with feedback


def feed_back(w: Tensor, fmt: Format, found: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (code - zero) [E, C, N], scales and zero points [E, G, N], all float32."""
    mt, v, order = found.mt, found.v, found.order
    n, size = w.shape[1], fmt.group_size
    wo = take(w, order)
    wrong, level = torch.zeros_like(wo), torch.empty_like(wo)  # w - q, code - zero, in the order of rounding
    scale, zero = (w.new_empty(len(w), fmt.groups(n), w.shape[-1]) for _ in range(2))
    for part in slices(n, size):
        target = wo[:, part]
        if part.start:
            target = torch.baddbmm(target, mt[:, part, : part.start], wrong[:, : part.start])
        s, z = searched_range(target, v[:, part], fmt)
        s, z = candidates(s, z, fmt)
        s, z = round_group(
            target, wo[:, part], mt[:, part, part], v[:, part], s, z, fmt, level[:, part], wrong[:, part]
        )
        place = (order[:, part.start] // size)[:, None, None].expand(-1, 1, w.shape[-1])
        scale.scatter_(1, place, s[:, None])
        zero.scatter_(1, place, z[:, None])
    return torch.empty_like(level).scatter_(1, order[..., None].expand_as(level), level), scale, zero


def round_group(
    target: Tensor, w: Tensor, mt: Tensor, v: Tensor, s: Tensor, z: Tensor, fmt: Format, level: Tensor, wrong: Tensor
) -> tuple[Tensor, Tensor]:
    """Round a group's columns in turn under each of K candidates s, z [E, K, N]; keep each row's cheapest.

    `target` [E, g, N] are the weights with the feedback of the groups before. Fills `level` and `wrong` [E, g, N];
    returns the scales and zero points kept [E, N].
    """
    experts, columns, rows = target.shape
    k = s.shape[1]
    low, high, inverse = -z, fmt.max_code - z, 1 / s
    levels, wrongs = (target.new_empty(experts, columns, k, rows) for _ in range(2))
    cost = torch.zeros_like(s)
    for block in slices(columns, BLOCK):
        first = block.start
        aims = target[:, block, None].expand(-1, -1, k, -1)
        if first:
            aims = aims + torch.bmm(mt[:, block, :first], wrongs[:, :first].flatten(2)).unflatten(-1, (k, rows))
        for j in range(first, block.stop):
            aim = aims[:, j - first]
            if j > first:
                aim = (
                    aim
                    + torch.bmm(mt[:, j, None, first:j], wrongs[:, first:j].flatten(2)).unflatten(-1, (k, rows))[:, 0]
                )
            x = torch.mul(aim, inverse, out=levels[:, j]).round_()
            torch.clamp(x, low, high, out=x)
            q = x * s
            torch.sub(w[:, j, None], q, out=wrongs[:, j])
            cost.addcmul_(v[:, j, None, None], q.sub_(aim).square_())
    best = cost.argmin(1, keepdim=True)
    pick = best[:, None].expand(-1, columns, -1, -1)
    level.copy_(levels.gather(2, pick)[:, :, 0])
    wrong.copy_(wrongs.gather(2, pick)[:, :, 0])
    return s.gather(1, best)[:, 0], z.gather(1, best)[:, 0]


# -------------------------------------------------------------------------------------------------- ranges


def searched_range(x: Tensor, weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point [E, N] of a group x [E, g, N] with the least weighted [E, g] rounding error.

    First clipped ranges, then, where codes are few, the zero points beside the best.
    """
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    # weights are known to have fp16 scales; with feedback they might not
    room = 0.999 * LARGEST * (fmt.max_code if fmt.scheme == "a" else max(2 ** (fmt.bits - 1) - 1, 1))
    within = (room / (high - low)).clamp(max=1)
    low, high = low * within, high * within
    weight = weight[:, None]
    scratch = (torch.empty_like(x), torch.empty_like(x))
    best = scale, zero = scale_and_zero(low, high, fmt)
    least = rounding_loss(x, weight, scale, zero, fmt, scratch)

    def attempt(scale: Tensor, zero: Tensor) -> None:
        nonlocal best, least
        loss = rounding_loss(x, weight, scale, zero, fmt, scratch)
        better = loss < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.where(better, loss, least)

    for clip in clips(fmt):
        attempt(*scale_and_zero(low * clip, high * clip, fmt))
    scale, zero = best
    for step in (-1, 1):
        for factor in neighbours(fmt):
            attempt(stored_scale((scale * factor).clamp_max(LARGEST)), (zero + step).clamp(0, fmt.max_code))
    return best


def tried(fmt: Format) -> Tried:
    return Tried(clips(fmt), neighbours(fmt), factors(fmt))


def clips(fmt: Format) -> tuple[float, ...]:
    """Shares of the whole range worth trying: the fewer the codes, the more a few large weights may be cut."""
    least = {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.7}.get(fmt.bits, 0.85)
    count = 8 if fmt.bits <= 4 else 3
    return tuple(1 - (1 - least) * i / count for i in range(1, count + 1))


def neighbours(fmt: Format) -> tuple[float, ...]:
    """Factors of the scale worth trying with the zero points beside the best, where codes are few."""
    return (0.87, 1.0, 1.13) if fmt.bits <= 3 and fmt.scheme == "a" else ()


def rounding_loss(x: Tensor, weight: Tensor, s: Tensor, z: Tensor, fmt: Format, scratch: tuple[Tensor, ...]) -> Tensor:
    """Weighted squared error [E, N] of rounding x [E, g, N]; weight [E, 1, g]."""
    t, q = scratch
    torch.mul(x, (1 / s)[:, None], out=t)
    torch.round(t, out=q)
    torch.clamp(q, min=-z[:, None], max=(fmt.max_code - z)[:, None], out=q)
    return torch.bmm(weight, q.sub_(t).square_())[:, 0] * s * s


def factors(fmt: Format) -> tuple[float, ...]:
    """Of the scale found, what a group is rounded with: the same, one narrower and one wider."""
    away = 0.2 / fmt.bits
    return 1.0, 1 - away, 1 + away


def candidates(s: Tensor, z: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """The scales and zero points [E, 3, N] that are rounded with feedback."""
    scales = torch.stack([s * factor for factor in factors(fmt)], 1)
    return stored_scale(scales.clamp_max(LARGEST)), torch.stack([z, z, z], 1)
