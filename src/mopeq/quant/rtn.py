"""Round to nearest: one scale and zero point per group from the group's own range. Needs no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mopeq.errors import BadInput
from mopeq.kernels.build import rounding
from mopeq.nouns import Format
from mopeq.tensors import QWeight, pack_bits, per_input

SMALLEST = 2.0**-24  # fp16's smallest positive number: the scale of a group that is all zeros
NORMAL = 2.0**-14  # below this fp16's steps no longer shrink with the number
LARGEST = 65504.0  # fp16's largest
AT_A_TIME = 1 << 24  # weights in float32 at a time


def grouped(w: Tensor, group_size: int) -> Tensor:
    """[..., in] -> [..., groups, group_size]; a short last group is filled with zeros, which every range includes."""
    return pad(w, (0, -w.shape[-1] % group_size)).unflatten(-1, (-1, group_size))


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as fp16 holds them (float32 here): the nearest, but the next above where fp16 is subnormal.

    There its steps are so coarse that rounding down would cut a group's range short by up to a third.
    """
    return torch.where(scale < NORMAL, (scale / SMALLEST).ceil().clamp_min(1) * SMALLEST, scale.half().float())


def scale_and_zero(low: Tensor, high: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """fp16-rounded scale and integer zero point (both float32 here) of groups whose values span low <= 0 <= high.

    The scale is rounded to fp16 before any code is chosen, so that what is stored is what was measured.
    """
    if fmt.scheme == "s":
        # the negative side has one code more; the larger side decides
        steps = max(2 ** (fmt.bits - 1) - 1, 1)
        scale = torch.maximum(-low / 2 ** (fmt.bits - 1), high / steps)
    else:
        scale = (high - low) / fmt.max_code
    if not bool((scale <= LARGEST).all()):
        if not bool(scale.isfinite().all()):
            kind = "NaN" if bool(scale.isnan().any()) else "infinite"
            raise BadInput(f"it holds {kind} weights", "the source is damaged; no quantizer can mend it")
        raise BadInput(
            f"a weight range of {float(scale.max()) * fmt.max_code:.3g} needs a scale beyond fp16",
            "the checkpoint holds outliers no fp16 scale can express; it is probably damaged",
        )
    scale = stored_scale(scale)
    if fmt.scheme == "s":
        return scale, torch.full_like(scale, 2.0 ** (fmt.bits - 1))
    return scale, (-low / scale).round().clamp(0, fmt.max_code)


def encode(w: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> QWeight:
    """The nearest codes for given scales and zero points [..., out, groups]."""
    n = w.shape[-1]
    steps = w / per_input(scale, fmt.group_size, n)
    codes = (steps.round() + per_input(zero, fmt.group_size, n)).clamp(0, fmt.max_code).to(torch.uint8)
    return QWeight(codes, scale.half(), None if fmt.scheme == "s" else zero.to(torch.uint8), fmt)


def quantize(w: Tensor, fmt: Format, **_: Any) -> QWeight:
    """Round [..., out, in] to the nearest codes. BadInput where a scale leaves fp16's range."""
    w = w.float()
    groups = grouped(w, fmt.group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale, zero = scale_and_zero(low, high, fmt)
    return encode(w, scale, zero, fmt)


def packed(w: Tensor, fmt: Format) -> dict[str, Tensor]:
    """`quantize(w, fmt).pack()` of one matrix [out, in], bit for bit: in one pass where a C compiler was found, else a
    bounded number of its rows at a time."""
    if (lib := rounding()) is not None and (made := packed_by(lib, w, fmt)) is not None:
        return made
    rows = w.split(max(1, AT_A_TIME // w.shape[1]))
    return QWeight.join([quantize(part, fmt) for part in rows]).pack()


def packed_by(lib: Any, w: Tensor, fmt: Format) -> dict[str, Tensor] | None:
    """By round.c; None where the matrix holds what it cannot round, which torch then names."""
    w = w.contiguous() if w.dtype == torch.bfloat16 else w.float().contiguous()
    (out, n), groups = w.shape, fmt.groups(w.shape[1])
    codes = torch.empty(out, -(-n * fmt.bits // 8), dtype=torch.uint8)
    scales, zeros = torch.empty(out, groups, dtype=torch.float16), torch.empty(out, groups, dtype=torch.uint8)
    kind, symmetric = int(w.dtype == torch.float32), fmt.scheme == "s"
    shape = (out, n, fmt.group_size, fmt.bits, int(symmetric))
    if lib.mopeq_round(w.data_ptr(), kind, *shape, *(t.data_ptr() for t in (codes, scales, zeros))):
        return None
    made = {"qweight": codes, "scales": scales}
    return made if symmetric else made | {"zeros": pack_bits(zeros.T.contiguous(), fmt.bits)}
