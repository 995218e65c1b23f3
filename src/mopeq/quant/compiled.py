"""Rounding with feedback and coordinate descent by kernels/gptq.c: what gptq.py and descent.py say in torch, on a CPU.

The codes are torch's but for ties that fall the other way, and do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from mopeq.kernels.build import feedback
from mopeq.nouns import Format


class CFormat(ctypes.Structure):
    """A format and what is tried for it, as gptq.c has it."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("clip_count", ctypes.c_int32),
        ("neighbour_count", ctypes.c_int32),
        ("clips", ctypes.c_float * 16),
        ("neighbours", ctypes.c_float * 4),
        ("factors", ctypes.c_float * 3),
    )

    @classmethod
    def of(
        cls, fmt: Format, clips: Sequence[float] = (), neighbours: Sequence[float] = (), factors: Sequence[float] = ()
    ) -> CFormat:
        made = cls(fmt.bits, fmt.scheme == "s", fmt.group_size, len(clips), len(neighbours))
        for array, values in ((made.clips, clips), (made.neighbours, neighbours), (made.factors, factors)):
            array[: len(values)] = values
        return made


def usable(w: Tensor) -> bool:
    """Whether gptq.c can work on a tensor here."""
    return w.device.type == "cpu" and w.dtype == torch.float32 and feedback() is not None


def feed_back(
    fmt: CFormat, groups: int, w: Tensor, mt: Tensor, v: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """gptq.feed_back: levels [E, C, N], scales and zero points [E, G, N]."""
    w, mt, v, order = (t.contiguous() for t in (w, mt, v, order))
    level, scale = torch.empty_like(w), w.new_empty(len(w), groups, w.shape[2])
    zero = torch.empty_like(scale)
    lib = feedback()
    assert lib is not None and order.dtype == torch.int64
    addresses = [t.data_ptr() for t in (w, mt, v, order, level, scale, zero)]
    on_threads(partial(lib.mopeq_feed_back, ctypes.byref(fmt), *w.shape, *addresses))
    return level, scale, zero


def descend(
    fmt: CFormat, w: Tensor, h: Tensor, level: Tensor, scale: Tensor, zero: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """descent.descend."""
    w, h, zero = (t.contiguous() for t in (w, h, zero))
    level, scale = (t.clone(memory_format=torch.contiguous_format) for t in (level, scale))
    lib = feedback()
    assert lib is not None
    addresses = [t.data_ptr() for t in (w, h, level, scale, zero)]
    on_threads(partial(lib.mopeq_descend, ctypes.byref(fmt), *w.shape, *addresses, sweeps))
    return level, scale


def on_threads(work: Callable[[int, int], int]) -> None:
    """`work(first, step)` with as many threads as torch takes; each takes every step-th tile. MemoryError."""
    n = torch.get_num_threads()
    if n == 1:
        failed = work(0, 1)
    else:
        with ThreadPoolExecutor(n) as pool:
            failed = any(pool.map(lambda first: work(first, n), range(n)))
    if failed:
        raise MemoryError("no memory to quantize in")
