"""Rounding with feedback and coordinate descent by kernels/gptq.c: what gptq.py and descent.py say in torch, on a CPU.

The codes are torch's but for ties that fall the other way, and do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mopeq.kernels.build import feedback
from mopeq.kernels.threads import share
from mopeq.nouns import Format

SETTINGS = {"clips": 16, "neighbours": 4, "factors": 3}  # how many there may be of each
TENSORS = ("w", "mt", "v", "order", "h", "half", "level", "scale", "zero")
LEAST = 128  # inputs from which on bf16 copies for AMX pay
PAD = 32  # columns beside them, as gptq.c has it


class Job(ctypes.Structure):
    """Matrices [E, C, N] and what is asked, as gptq.c has it."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("bits", "symmetric", "group", "sweeps", "clip_count", "neighbour_count")),
        *((name, ctypes.c_float * most) for name, most in SETTINGS.items()),
        *((name, ctypes.c_int64) for name in ("experts", "n", "out")),
        *((name, ctypes.c_void_p) for name in TENSORS),
    )


def usable(w: Tensor) -> bool:
    """Whether gptq.c can work on a tensor here."""
    return w.device.type == "cpu" and w.dtype == torch.float32 and feedback() is not None


def feed_back(
    w: Tensor,
    fmt: Format,
    mt: Tensor,
    v: Tensor,
    order: Tensor,
    clips: Sequence[float],
    neighbours: Sequence[float],
    factors: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """gptq.feed_back, with what it tries: clipped ranges, scales beside neighbouring zero points, scales."""
    level, scale = w.new_empty(w.shape), w.new_empty(len(w), fmt.groups(w.shape[1]), w.shape[2])
    zero = torch.empty_like(scale)
    job = Job(fmt.bits, fmt.scheme == "s", fmt.group_size, 0, len(clips), len(neighbours))
    for name, values in zip(SETTINGS, (clips, neighbours, factors), strict=True):
        getattr(job, name)[: len(values)] = values
    given = {"w": w, "mt": mt, "v": v, "order": order, "level": level, "scale": scale, "zero": zero}
    run(job, given | in_half(mt, fmt, w.shape[2]))
    return level, scale, zero


def descend(
    w: Tensor, fmt: Format, h: Tensor, level: Tensor, scale: Tensor, zero: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """descent.descend."""
    level, scale = (t.clone(memory_format=torch.contiguous_format) for t in (level, scale))
    job = Job(fmt.bits, fmt.scheme == "s", fmt.group_size, sweeps)
    run(job, {"w": w, "h": h, "level": level, "scale": scale, "zero": zero} | in_half(h, fmt, w.shape[2]))
    return level, scale


def in_half(rows_ECC: Tensor, fmt: Format, out: int) -> dict[str, Tensor]:
    """`half` of a job: mt or h in bf16 with padding around, where AMX tiles can take it and are in use."""
    lib = feedback()
    assert lib is not None
    experts, n, _ = rows_ECC.shape
    if not lib.mopeq_gptq_tiled(fmt.group_size, out) or n < LEAST:
        return {}
    padded = -(-n // 32) * 32
    half = torch.zeros(experts, padded, padded + PAD, dtype=torch.bfloat16)
    half[:, :n, :n] = rows_ECC
    return {"half": half}


def run(job: Job, tensors: dict[str, Tensor]) -> None:
    """Have as many threads as torch takes share a job's tiles. MemoryError."""
    lib = feedback()
    assert lib is not None
    tensors = {name: t.contiguous() for name, t in tensors.items()}  # what is filled is contiguous, and stays itself
    job.experts, job.n, job.out = tensors["w"].shape
    for name, t in tensors.items():
        setattr(job, name, t.data_ptr())
    share(lib.mopeq_gptq, job)
