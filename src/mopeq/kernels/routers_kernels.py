"""The choice of a token's experts by one Triton kernel, where models take seven or more operators."""

# mypy: ignore-errors
# (what stands below is Triton's language, not Python's)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def route(x, weight, correction, logits, weights, index, arrived, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
          SOFTMAX: tl.constexpr, NORMALIZED: tl.constexpr, CORRECTED: tl.constexpr, SCALE: tl.constexpr,
          BH: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """A program makes one logit of one token; a token's last to finish chooses. `arrived` counts them, and is 0 again
    afterwards. Of equal scores the first is chosen first."""
    e, t = tl.program_id(0), tl.program_id(1)
    h = tl.arange(0, BH)
    w = tl.load(weight + e * H + h, mask=h < H, other=0.0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    logit = tl.sum(w.to(tl.float32) * tl.load(x + t * H + h, mask=h < H, other=0.0).to(tl.float32), 0)
    tl.store(logits + t * E + e, logit.to(logits.dtype.element_ty))
    tl.debug_barrier()  # so that one thread's release is every thread's
    if tl.atomic_add(arrived + t, 1, sem="acq_rel") == E - 1:
        tl.store(arrived + t, 0)
        i = tl.arange(0, EP)
        value = tl.load(logits + t * E + i, mask=i < E, other=float("-inf"), cache_modifier=".cg").to(tl.float32)
        if SOFTMAX:
            score = tl.exp(value - tl.max(value, 0))
            score = score / tl.sum(score, 0)
        else:
            score = tl.sigmoid(value)
        by = score
        if CORRECTED:
            by += tl.load(correction + i, mask=i < E, other=0.0).to(tl.float32)
        # scores and places in one number each, in the scores' order: what is largest is found by one maximum
        bits = by.to(tl.int32, bitcast=True)
        keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) * EP + (EP - 1 - i)
        keys = tl.where(i < E, keys, -(2**62))
        j = tl.arange(0, KP)
        chosen = tl.zeros([KP], tl.int64)
        found = tl.zeros([KP], tl.float32)
        for n in tl.static_range(K):
            best = tl.max(keys, 0)
            mine = keys == best
            keys = tl.where(mine, -(2**62), keys)
            chosen = tl.where(j == n, EP - 1 - (best & (EP - 1)), chosen)
            found = tl.where(j == n, tl.sum(tl.where(mine, score, 0.0), 0), found)
        if NORMALIZED:
            found = found / tl.sum(found, 0)
        tl.store(weights + t * K + j, (found * SCALE).to(weights.dtype.element_ty), mask=j < K)
        tl.store(index + t * K + j, chosen, mask=j < K)
