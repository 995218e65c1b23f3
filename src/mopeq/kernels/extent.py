"""What is asked of all weights of a tensor before they are rounded, each in one pass: their squares, their largest."""

from __future__ import annotations

import ctypes
import math
import struct

import torch
from torch import Tensor

from mopeq.kernels.build import rounding

KIND = {torch.bfloat16: 0, torch.float32: 1}


def reader(w: Tensor) -> ctypes.CDLL | None:
    """round.c, where it can read a tensor here; else None."""
    return rounding() if w.is_cpu and w.dtype in KIND and w.is_contiguous() else None


def squares(w: Tensor) -> float:
    """The sum of w^2, in float64; not finite where a weight is not."""
    if (lib := reader(w)) is None:
        return float(w.double().square().sum())
    found = ctypes.c_double()
    lib.mopeq_extent(w.data_ptr(), KIND[w.dtype], w.numel(), ctypes.byref(found), None)
    return found.value


def largest(w: Tensor) -> float:
    """The largest |w|; NaN where there is one, 0 of none."""
    if not w.numel():
        return 0.0
    if (lib := reader(w)) is None:
        low, high = w.aminmax()  # one pass, nothing to hold; NaN prevails in both
        return math.nan if math.isnan(low) else max(-float(low), float(high))
    found = ctypes.c_uint32()
    lib.mopeq_extent(w.data_ptr(), KIND[w.dtype], w.numel(), None, ctypes.byref(found))
    return float(struct.unpack("f", struct.pack("I", found.value))[0])
