"""A gather-GEMV in bf16, the fastest bf16 we know for few tokens: `bench` measures itself against it on GPUs."""

# mypy: ignore-errors
# (what stands below is Triton's language, not Python's)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gemv(w, x, y, ids, K: tl.constexpr, N: tl.constexpr, CHOICES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y[pair] = w[ids[pair]] x[pair // CHOICES], with w [E, N, K]."""
    pair = tl.program_id(1)
    e = tl.load(ids + pair).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN, BK], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        at = w + e * (N * K) + n[:, None] * K + k[None, :]
        w_tile = tl.load(at, mask=(k < K)[None, :] & (n < N)[:, None], other=0.0).to(tl.float32)
        x_tile = tl.load(x + (pair // CHOICES) * K + k, mask=k < K, other=0.0).to(tl.float32)
        acc += w_tile * x_tile[None, :]
    tl.store(y + pair * N + n, tl.sum(acc, 1).to(y.dtype.element_ty), mask=n < N)
