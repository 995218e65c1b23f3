"""Prompts on Hopper: the products of many tokens with packed matrices, unpacking while the tensor cores work.

What Triton leaves to chance is written out here, in Gluon: the weights of a slot are unpacked into registers while the
`wgmma` of the slot before is still running, activations and words arrive in shared memory some steps ahead.
"""

# mypy: ignore-errors
# (what stands below is Triton's language, not Python's)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from mopeq.kernels.triton_kernels import SILU, activated, left_at, subtrahend, unpack_asm

# Triton 3.6 has other names for them than later versions
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)


@gluon.jit
def copy(to, at, there, MASKED: gl.constexpr):
    if MASKED:
        async_load(to, at, mask=there)
    else:
        async_load(to, at)


@gluon.jit
def fetch(i, first, second, x, x_at, x_k, xs, ws, us, w_at, w_there, u_at, u_there, BITS: gl.constexpr,
          NP: gl.constexpr, K: gl.constexpr, W: gl.constexpr, R: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
          STAGES: gl.constexpr, RING: gl.constexpr):  # fmt: skip
    """Begin copying stage i: BK inputs of the activations, and the words of a tile where one begins."""
    WHOLE: gl.constexpr = (K + R * BK - 1) // (R * BK) * R * BK
    if i < WHOLE // BK:
        k = i * BK
        copy(xs.index(i % STAGES), x + (x_at + k), x_k + k < K, WHOLE != K)  # beyond K: zeros
        if i % R == 0:
            t = i // R
            copy(ws.index(t % RING), first + (w_at + t * (NP * W // 2)), w_there, NP % BN != 0)
            if BITS == 8 or BITS == 3 or BITS == 6:
                copy(us.index(t % RING), second + (u_at + t * (NP * W // 2)), u_there, NP % BN != 0)
    async_copy.commit_group()


@gluon.jit
def unpacked(words, second, less, times, BITS: gl.constexpr, SLOT: gl.constexpr, RUN: gl.constexpr,
             DTYPE: gl.constexpr, A: gl.constexpr):  # fmt: skip
    """Pairs of words [BN, W / 2] and their second plane -> the weights [BN, W] of a slot."""
    PLANE: gl.constexpr = BITS == 3 or BITS == 6
    kinds: gl.constexpr = "=h,=h,r,h,r,r" if PLANE else "=h,=h,r,r,r,r"
    if gl.bfloat16 == DTYPE:
        ASM: gl.constexpr = unpack_asm(BITS, SLOT, True, True, True, left_at(BITS, SLOT, RUN, 7))
        a, b = gl.inline_asm_elementwise(ASM, kinds, [words, second, less, times], dtype=(gl.bfloat16, gl.bfloat16),
                                         is_pure=True, pack=1)  # fmt: skip
    else:
        ASM: gl.constexpr = unpack_asm(BITS, SLOT, False, True, True, left_at(BITS, SLOT, RUN, 10))
        a, b = gl.inline_asm_elementwise(ASM, kinds, [words, second, less, times], dtype=(gl.float16, gl.float16),
                                         is_pure=True, pack=1)  # fmt: skip
    return gl.convert_layout(gl.join(a, b).reshape([words.shape[0], words.shape[1] * 2]), A, assert_trivial=True)


@gluon.jit
def twice(value):
    """Each 16-bit value in both halves of 32 bits."""
    return gl.inline_asm_elementwise("mov.b32 $0, {$1, $1};", "=r,h", [value], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def product_of(place, words, pairs, bytes, halves, n0, x, x_row, BITS: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
               W: gl.constexpr, GROUP: gl.constexpr, UNIFORM: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr,
               STAGES: gl.constexpr, MMA: gl.constexpr, XL: gl.constexpr):  # fmt: skip
    """Rows n0 … of one matrix times activations [BM, K]: float32 [BN, BM]."""
    DTYPE: gl.constexpr = x.dtype.element_ty
    NW: gl.constexpr = gl.num_warps()
    NP: gl.constexpr = (N + 15) // 16 * 16
    S: gl.constexpr = 8 if BITS <= 3 else 4
    BK: gl.constexpr = 64
    Q: gl.constexpr = BK // W
    R: gl.constexpr = S * W // BK
    TILES: gl.constexpr = (K + S * W - 1) // (S * W)
    AHEAD: gl.constexpr = STAGES - 1
    RING: gl.constexpr = (AHEAD + R - 1) // R + 1
    GROUPS: gl.constexpr = 2 if GROUP % 64 != 0 else 1  # of a stage
    RUN: gl.constexpr = Q // GROUPS  # slots that share `less`
    ROOM: gl.constexpr = 7 if gl.bfloat16 == DTYPE else 10  # bits of a mantissa
    PLANE: gl.constexpr = BITS == 3 or BITS == 6  # a byte for each word
    KEEP: gl.constexpr = BN * BM <= 64 * 32 * NW  # the words of a tile, where sums leave registers for them
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    PAIRS: gl.constexpr = gl.DotOperandLayout(0, MMA, 1)
    H: gl.constexpr = W // 2
    WL: gl.constexpr = gl.BlockedLayout([1, 4], [256 // W, W // 8], [NW, 1], [1, 0])
    UL: gl.constexpr = gl.BlockedLayout([1, 8], [512 // W, W // 16], [NW, 1], [1, 0])
    w_smem: gl.constexpr = gl.SwizzledSharedLayout(4, 64 // W, W // 8, [1, 0])
    u_smem: gl.constexpr = gl.SwizzledSharedLayout(8, 4, W // 16, [1, 0])
    x_smem: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    xs = gl.allocate_shared_memory(DTYPE, [STAGES, BM, BK], x_smem)
    ws = gl.allocate_shared_memory(gl.int32, [RING, BN, H], w_smem)
    us = ws
    second = pairs
    if BITS == 8:
        us = gl.allocate_shared_memory(gl.int32, [RING, BN, H], w_smem)
        second = words + gl.multiple_of(gl.load(place + 1) // 2, 4)
    elif PLANE:
        us = gl.allocate_shared_memory(gl.int16, [RING, BN, H], u_smem)
        second = pairs + gl.multiple_of(gl.load(place + 1) // 2, 8)
    first = words + gl.multiple_of(gl.load(place) // 2, 4)
    scales = halves + gl.load(place + 2)
    zeros = bytes + gl.load(place + 3)
    group = gl.load(place + 5).to(gl.int32)
    if UNIFORM:
        group = GROUP
    x_k = gl.arange(0, BK, layout=gl.SliceLayout(0, XL))[None, :]
    x_at = x_row[:, None] + x_k
    x_k = x_k + x_row[:, None] * 0
    rows = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, WL))
    w_at = rows[:, None] * H + gl.arange(0, H, layout=gl.SliceLayout(0, WL))[None, :]
    w_there = w_at < NP * H
    u_at = w_at
    u_there = w_there
    if PLANE:
        u_rows = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, UL))
        u_at = u_rows[:, None] * H + gl.arange(0, H, layout=gl.SliceLayout(0, UL))[None, :]
        u_there = u_at < NP * H
    n = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, PAIRS))
    n_there = n < NP
    for early in gl.static_range(AHEAD):
        fetch(early, first, second, x, x_at, x_k, xs, ws, us, w_at, w_there, u_at, u_there, BITS, NP, K, W, R, BN, BK,
              STAGES, RING)  # fmt: skip
    acc = gl.zeros([BN, BM], gl.float32, MMA)
    scale = gl.load(scales + n, mask=n_there, other=0.0)
    zero = gl.load(zeros + n, mask=n_there, other=0)
    scale_2 = scale
    zero_2 = zero
    if GROUPS == 2:
        at_2 = (32 // group) * NP + n
        scale_2 = gl.load(scales + at_2, mask=n_there & (K > 32), other=0.0)
        zero_2 = gl.load(zeros + at_2, mask=n_there & (K > 32), other=0)
    # from 0, told so late that a loop of one tile stays a loop: Triton 3.6 cannot compile what is left of it else
    for t in range(gl.program_id(2), TILES):
        for r in gl.static_range(R):
            i = t * R + r
            async_copy.wait_group(AHEAD - 1)
            fence_async_shared()
            less = twice(subtrahend(zero, BITS, DTYPE, True, left_at(BITS, r * Q, RUN, ROOM)).to(DTYPE))
            times = twice(scale.to(gl.float32).to(DTYPE))
            less_2 = less
            times_2 = times
            if GROUPS == 2:
                less_2 = subtrahend(zero_2, BITS, DTYPE, True, left_at(BITS, r * Q + Q // 2, RUN, ROOM))
                less_2 = twice(less_2.to(DTYPE))
                times_2 = twice(scale_2.to(gl.float32).to(DTYPE))
            k = (i + 1) * BK  # the next stage's
            at = (k // group) * NP + n
            scale = gl.load(scales + at, mask=n_there & (k < K), other=0.0)
            zero = gl.load(zeros + at, mask=n_there & (k < K), other=0)
            if GROUPS == 2:
                at = ((k + 32) // group) * NP + n
                scale_2 = gl.load(scales + at, mask=n_there & (k + 32 < K), other=0.0)
                zero_2 = gl.load(zeros + at, mask=n_there & (k + 32 < K), other=0)
            for q in gl.static_range(Q):
                if not KEEP or (r == 0 and q == 0):
                    lo = ws.index(t % RING).load(PAIRS)
                    hi = lo
                    if BITS == 8 or PLANE:
                        hi = us.index(t % RING).load(PAIRS)
                if q * W < 32:
                    a = unpacked(lo, hi, less[:, None], times[:, None], BITS, r * Q + q, RUN, DTYPE, A)
                else:
                    a = unpacked(lo, hi, less_2[:, None], times_2[:, None], BITS, r * Q + q, RUN, DTYPE, A)
                x_q = xs.index(i % STAGES).permute((1, 0)).slice(q * W, W, dim=0)
                acc = warpgroup_mma(a, x_q, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
            fetch(i + AHEAD, first, second, x, x_at, x_k, xs, ws, us, w_at, w_there, u_at, u_there, BITS, NP, K, W, R,
                  BN, BK, STAGES, RING)  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)
    barrier()
    return acc


@gluon.jit
def one(e, p, table, words, pairs, bytes, halves, n0, x, x_row, E: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
        W: gl.constexpr, GROUP: gl.constexpr, UNIFORM: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr,
        WIDTHS: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr, XL: gl.constexpr):  # fmt: skip
    """Rows n0 … of expert e's matrix number p times the activations: [BN, BM], float32."""
    place = table + (p * E + e) * 6
    bits = gl.load(place + 4)
    acc = gl.zeros([BN, BM], gl.float32, MMA)
    for B in gl.static_range(2, 9):
        if (WIDTHS >> B) & 1:  # noqa: SIM102
            if bits == B:  # not known when this is compiled: no `and`
                acc = product_of(place, words, pairs, bytes, halves, n0, x, x_row, B, N, K, W, GROUP, UNIFORM, BN, BM,
                                 STAGES, MMA, XL)  # fmt: skip
    return acc


@gluon.jit
def gated(gate, up, GATED: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr):
    """`activated`, but for SiLU's division, which takes two instructions instead of ten (exact to some 2^-22)."""
    if ACT == SILU:
        value = gl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 t, t; mul.f32 $0, $1, t; }", "=f,f", [gate], dtype=gl.float32, is_pure=True,
            pack=1,
        )  # fmt: skip
        if GATED:
            value = value * up
    else:
        value = activated(gate, up, GATED, ACT, ALPHA, LIMIT)
    return value


@gluon.jit
def tile(e, start, end, n0, x, h, table, words, pairs, bytes, halves, bias_gate, bias_up, sorted_pairs,
         LONE: gl.constexpr, P: gl.constexpr, CHOICES: gl.constexpr, E: gl.constexpr, N: gl.constexpr,
         K: gl.constexpr, W: gl.constexpr, GROUP: gl.constexpr, UNIFORM: gl.constexpr, GATED: gl.constexpr,
         ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, BIAS: gl.constexpr, WIDTHS: gl.constexpr,
         BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """One tile of h[pair]: act(gate x) * (up x) by matrices P, P + 1; ACT == 0: matrix P of x, without bias."""
    NW: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NW, 1], [16, BM, 16])
    XL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [NW, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, NW], [0, 1])
    j = start + gl.arange(0, BM, layout=gl.SliceLayout(1, XL))
    j_out = start + gl.arange(0, BM, layout=gl.SliceLayout(0, OUT))
    n = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, OUT))
    if LONE:
        x_row = gl.where(j < end, j, 0) * K  # rows that are not there: the first
        pair = j_out
    else:
        x_row = gl.load(sorted_pairs + j, mask=j < end, other=0) // CHOICES * K
        pair = gl.load(sorted_pairs + j_out, mask=j_out < end, other=0)
    to = pair.to(gl.int64)[None, :] * N + n[:, None]
    mask = (j_out < end)[None, :] & (n < N)[:, None]
    for side in range(0, 2 if ACT > 0 and GATED else 1):  # gate, then up
        y = one(e, P + side, table, words, pairs, bytes, halves, n0, x, x_row, E, N, K, W, GROUP, UNIFORM, BN, BM,
                WIDTHS, STAGES, MMA, XL)  # fmt: skip
        turned = gl.allocate_shared_memory(h.dtype.element_ty, [BM, BN], gl.NVMMASharedLayout(128, 16, 2))
        turned.permute((1, 0)).store(y.to(h.dtype.element_ty))
        barrier()
        y = turned.permute((1, 0)).load(OUT)
        if ACT > 0:  # noqa: SIM102
            if side == (1 if GATED else 0):  # not known when this is compiled: no `and`
                up = y.to(gl.float32)
                gate = up
                if GATED:
                    gate = gl.load(h + to, mask=mask, other=0.0).to(gl.float32)
                if BIAS:
                    up += gl.load(bias_up + e * N + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
                    if GATED:
                        gate += gl.load(bias_gate + e * N + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
                y = gated(gate, up, GATED, ACT, ALPHA, LIMIT).to(h.dtype.element_ty)
        gl.store(h + to, y, mask=mask)


@gluon.jit(do_not_specialize=["rows"])
def many(x, h, table, words, pairs, bytes, halves, bias_gate, bias_up, sorted_pairs, tile_expert, tile_start, tile_end,
         rows, LONE: gl.constexpr, P: gl.constexpr, CHOICES: gl.constexpr, E: gl.constexpr, N: gl.constexpr,
         K: gl.constexpr, W: gl.constexpr, GROUP: gl.constexpr, UNIFORM: gl.constexpr, GATED: gl.constexpr,
         ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, BIAS: gl.constexpr, WIDTHS: gl.constexpr,
         TILE: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """BM pairs of a tile of TILE times BN rows; where fewer are left, half or a quarter as many.

    LONE: there is one matrix, and a pair is one of the `rows` of x.
    """
    t = gl.program_id(1) // (TILE // BM)
    n0 = gl.program_id(0) * BN
    e = 0
    start = t * TILE
    end = rows
    if not LONE:
        e = gl.load(tile_expert + t)
        start = gl.load(tile_start + t)
        end = gl.load(tile_end + t)
    start += gl.program_id(1) % (TILE // BM) * BM
    if e >= 0:
        if end - start > BM // 2:
            tile(e, start, end, n0, x, h, table, words, pairs, bytes, halves, bias_gate, bias_up, sorted_pairs, LONE, P,
                 CHOICES, E, N, K, W, GROUP, UNIFORM, GATED, ACT, ALPHA, LIMIT, BIAS, WIDTHS, BN, BM,
                 STAGES)  # fmt: skip
        elif end - start > BM // 4:
            tile(e, start, end, n0, x, h, table, words, pairs, bytes, halves, bias_gate, bias_up, sorted_pairs, LONE, P,
                 CHOICES, E, N, K, W, GROUP, UNIFORM, GATED, ACT, ALPHA, LIMIT, BIAS, WIDTHS, BN, BM // 2,
                 STAGES)  # fmt: skip
        elif end > start:
            tile(e, start, end, n0, x, h, table, words, pairs, bytes, halves, bias_gate, bias_up, sorted_pairs, LONE, P,
                 CHOICES, E, N, K, W, GROUP, UNIFORM, GATED, ACT, ALPHA, LIMIT, BIAS, WIDTHS, BN, BM // 4,
                 STAGES)  # fmt: skip
