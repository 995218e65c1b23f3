"""Rounding with feedback, coordinate descent and what they need of moments, by kernels/gptq.c and factors.c: what
gptq.py and descent.py say in torch, on a CPU.

The codes are torch's but for ties that fall the other way, and do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mopeq.kernels import build
from mopeq.kernels.threads import share
from mopeq.nouns import Format

SETTINGS = {"clips": 16, "neighbours": 4, "factors": 3}  # how many there may be of each
TENSORS = ("w", "mt", "v", "order", "h", "half_mt", "half_h", "level", "scale", "zero", "codes")
MADE = ("moments", "order", "damping"), ("h", "mt", "v", "half_h", "half_mt", "failed")
LEAST = 128  # inputs from which on bf16 copies for AMX pay
PAD = 32  # columns beside them, as product.h has it


class Job(ctypes.Structure):
    """Matrices [E, C, N] and what is asked, as gptq.c has it."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("bits", "symmetric", "group", "sweeps", "clip_count", "neighbour_count")),
        *((name, ctypes.c_float * most) for name, most in SETTINGS.items()),
        *((name, ctypes.c_int64) for name in ("experts", "n", "out")),
        *((name, ctypes.c_void_p) for name in TENSORS),
    )


class Moments(ctypes.Structure):
    """Moments [E, C, C] and room for what is made of them, as factors.c has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in MADE[0]),
        *((name, ctypes.c_int64) for name in ("experts", "n")),
        *((name, ctypes.c_void_p) for name in MADE[1]),
    )


@dataclass(frozen=True)
class Factors:
    """Damped moments H [E, C, C]; M transposed [E, C, C] and v [E, C] of H = M diag(v) M^T, M unit upper triangular,
    with the columns in the order [E, C] they are rounded in. Both matrices also in bf16 with padding around, where
    gptq.c takes them so."""

    h: Tensor
    mt: Tensor
    v: Tensor
    order: Tensor
    half_h: Tensor | None = None
    half_mt: Tensor | None = None


@dataclass(frozen=True)
class Tried:
    """What rounding with feedback tries: clipped ranges, scales beside neighbouring zero points, scales."""

    clips: tuple[float, ...]
    neighbours: tuple[float, ...]
    factors: tuple[float, ...]


def usable(w: Tensor) -> bool:
    """Whether gptq.c can work on a tensor here."""
    return w.device.type == "cpu" and w.dtype == torch.float32 and build.feedback() is not None


def factors_usable(moments: Tensor) -> bool:
    """Whether factors.c can work on a tensor here."""
    return usable(moments) and build.factors() is not None


def factors_of(moments_ECC: Tensor, order_EC: Tensor, damping_E: Tensor, group_size: int) -> tuple[Tensor, Factors]:
    """descent.factors_of, and of some groups the halves. MemoryError."""
    lib = build.factors()
    assert lib is not None
    experts, n, _ = moments_ECC.shape
    given = {"moments": moments_ECC, "order": order_EC, "damping": damping_E}
    given = {name: t.contiguous() for name, t in given.items()}
    room = moments_ECC.new_empty  # of their type and device, whatever torch's defaults are here
    made = {"h": room(experts, n, n), "mt": room(experts, n, n), "v": room(experts, n)}
    if takes_halves(group_size) and n >= LEAST:
        padded = -(-n // 32) * 32
        made |= {k: room(experts, padded, padded + PAD, dtype=torch.bfloat16) for k in ("half_h", "half_mt")}
    failed = room(experts, dtype=torch.int32)
    addresses = {name: t.data_ptr() for name, t in (given | made | {"failed": failed}).items()}
    job = Moments(experts=experts, n=n, **addresses)
    share(lib.mopeq_factors, job)
    return failed, Factors(order=order_EC, **made)


def takes_halves(group_size: int, out: int = 64) -> bool:
    """Whether gptq.c multiplies by AMX where groups and outputs are so many."""
    lib = build.feedback()
    return lib is not None and bool(lib.mopeq_gptq_tiled(group_size, out))


def descend(
    w: Tensor, fmt: Format, h: Tensor, level: Tensor, scale: Tensor, zero: Tensor, sweeps: int, half_h: Tensor | None
) -> tuple[Tensor, Tensor]:
    """descent.descend."""
    level, scale, zero = (t.clone(memory_format=torch.contiguous_format) for t in (level, scale, zero))
    run(job_of(fmt, sweeps), {"w": w, "h": h, "half_h": half_h, "level": level, "scale": scale, "zero": zero})
    return level, scale


def solve(w: Tensor, fmt: Format, found: Factors, tried: Tried, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """gptq.feed_back, then descent.descend: codes uint8 [E, N, C], scales and zero points [E, G, N]."""
    groups = len(w), fmt.groups(w.shape[1]), w.shape[2]
    filled = {
        "codes": w.new_empty(w.mT.shape, dtype=torch.uint8),
        "scale": w.new_empty(groups),
        "zero": w.new_empty(groups),
    }
    names = ("mt", "v", "order", "h", "half_mt", "half_h")
    run(job_of(fmt, sweeps, tried), {"w": w, **{name: getattr(found, name) for name in names}, **filled})
    return filled["codes"], filled["scale"], filled["zero"]


def job_of(fmt: Format, sweeps: int, tried: Tried | None = None) -> Job:
    job = Job(fmt.bits, fmt.scheme == "s", fmt.group_size, sweeps)
    if tried is not None:
        job.clip_count, job.neighbour_count = len(tried.clips), len(tried.neighbours)
        for name in SETTINGS:
            values = getattr(tried, name)
            getattr(job, name)[: len(values)] = values
    return job


def run(job: Job, tensors: Mapping[str, Tensor | None]) -> None:
    """Have as many threads as torch takes share a job's tiles. MemoryError."""
    lib = build.feedback()
    assert lib is not None
    # what is filled is contiguous, and stays itself
    there = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    job.experts, job.n, job.out = there["w"].shape
    halved = takes_halves(job.group, job.out)
    for name, t in there.items():
        if halved or not name.startswith("half"):
            setattr(job, name, t.data_ptr())
    share(lib.mopeq_gptq, job)
