"""Prompts on Hopper: the products of many tokens with packed matrices, unpacking while the tensor cores work.

What Triton leaves to chance is written out here, in Gluon: the weights of a slot are unpacked into registers while the
`wgmma` of the slot before is still running, activations and words arrive in shared memory some steps ahead.
"""

# mypy: ignore-errors
# (what stands below is Triton's language, not Python's)

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mopeq.kernels.triton_kernels import SILU, activated, left_at, unpack_asm

NOBODY = gl.constexpr(-(2**30))  # where activations lie for a tile's place without a pair
MOST = gl.constexpr(2**31 - 1)

# Triton 3.6 has other names for them than later versions
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)


@triton.constexpr_function
def inputs_of(bits, words, most):
    """The inputs of a stage: those of a tile, but `most` at most."""
    return min(most, (8 if bits <= 3 else 4) * words)


@gluon.jit
def copy(to, at, there, MASKED: gl.constexpr):
    if MASKED:
        async_load(to, at, mask=there)
    else:
        async_load(to, at)


@gluon.jit
def fetch(i, first, second, scales, zeros, x, x_at, x_k, xs, ws, us, ss, zs, w_at, w_there, u_at, u_there, s_at, z_at,
          s_k, z_k, group, BITS: gl.constexpr, NP: gl.constexpr, K: gl.constexpr, W: gl.constexpr, R: gl.constexpr,
          BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
          SPARSE: gl.constexpr):  # fmt: skip
    """Begin copying stage i: BK inputs of the activations, and what there is of a tile where one begins."""
    WHOLE: gl.constexpr = (K + R * BK - 1) // (R * BK) * R * BK
    FULL: gl.constexpr = NP % BN == 0
    if i < WHOLE // BK:
        k = i * BK
        there = x_at >= 0
        if WHOLE != K:
            there = there & (x_k + k < K)
        copy(xs.index(i % STAGES), x + (x_at + k), there, SPARSE or WHOLE != K)  # zeros where there is nothing
        if i % R == 0:
            t = i // R
            to = t % RING
            copy(ws.index(to), first + (w_at + t * (NP * W // 2)), w_there, not FULL)
            if BITS == 8:
                copy(us.index(to), second + (u_at + t * (NP * W // 2)), u_there, not FULL)
            elif BITS == 3 or BITS == 6:
                copy(us.index(to), second + (u_at + t * (NP * W // 4)), u_there, not FULL)
            # what Triton cannot see for itself, and must to copy 4 bytes at a time: a group's rows lie together
            s_group = gl.max_constancy((s_k + k) // group, [16])
            z_group = gl.max_constancy((z_k + k) // group, [16])
            s_there = gl.max_constancy((s_k + k < K) & (s_at < NP), [16])
            z_there = gl.max_constancy((z_k + k < K) & (z_at < NP), [16])
            copy(ss.index(to), scales + (s_group * NP + s_at), s_there, not FULL or WHOLE != K)
            copy(zs.index(to), zeros + (z_group * NP + z_at), z_there, not FULL or WHOLE != K)
    async_copy.commit_group()


@gluon.jit
def unpacked(words, second, less, times, BITS: gl.constexpr, SLOT: gl.constexpr, RUN: gl.constexpr,
             DTYPE: gl.constexpr, A: gl.constexpr):  # fmt: skip
    """Pairs of words [BN, W / 2] and their second plane -> the weights [BN, W] of a slot."""
    if gl.bfloat16 == DTYPE:
        ASM: gl.constexpr = unpack_asm(BITS, SLOT, True, True, True, left_at(BITS, SLOT, RUN, 7))
        a, b = gl.inline_asm_elementwise(ASM, "=h,=h,r,r,r,r", [words, second, less, times],
                                         dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)  # fmt: skip
    else:
        ASM: gl.constexpr = unpack_asm(BITS, SLOT, False, True, True, left_at(BITS, SLOT, RUN, 10))
        a, b = gl.inline_asm_elementwise(ASM, "=h,=h,r,r,r,r", [words, second, less, times],
                                         dtype=(gl.float16, gl.float16), is_pure=True, pack=1)  # fmt: skip
    return gl.convert_layout(gl.join(a, b).reshape([words.shape[0], words.shape[1] * 2]), A, assert_trivial=True)


@gluon.jit
def widened(both, PAIRS: gl.constexpr):
    """The second plane's bytes [BN, W / 4], two words' in 16 bits -> [BN, W / 2], with whatever above a byte."""
    upper = gl.inline_asm_elementwise("shr.b32 $0, $1, 8;", "=r,r", [both], dtype=gl.int32, is_pure=True, pack=1)
    hi = gl.join(both, upper).permute((0, 2, 1)).reshape([both.shape[0], both.shape[1] * 2])
    return gl.convert_layout(hi, PAIRS)


@gluon.jit
def twice(value):
    """Each 16-bit value in both halves of 32 bits."""
    return gl.inline_asm_elementwise("mov.b32 $0, {$1, $1};", "=r,h", [value], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def less_of(zero, BITS: gl.constexpr, SLOT: gl.constexpr, RUN: gl.constexpr, DTYPE: gl.constexpr):
    """Minus the base that unpacking leaves in, minus zero points: in both halves of 32 bits."""
    BF16: gl.constexpr = gl.bfloat16 == DTYPE
    if BITS == 8 and BF16:
        less = twice((-zero.to(gl.float32)).to(DTYPE))
    else:  # a zero point is below the base, so it fits into the mantissa: one instruction instead of a conversion
        ROOM: gl.constexpr = 7 if BF16 else 10
        LEFT: gl.constexpr = left_at(BITS, SLOT, RUN, ROOM)
        BASE: gl.constexpr = ((ROOM - LEFT + (127 if BF16 else 15)) << ROOM) * 0x10001 - 0x7FFF8000
        less = zero.to(gl.int32) * (0x10001 << LEFT) + BASE
    return less


@gluon.jit
def product_of(place, words, bytes, halves, n0, x, x_row, BITS: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
               W: gl.constexpr, GROUP: gl.constexpr, UNIFORM: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr,
               STAGES: gl.constexpr, SPARSE: gl.constexpr, BK: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    """Rows n0 … of one matrix times activations [BM, K]: float32 [BN, BM]."""
    DTYPE: gl.constexpr = x.dtype.element_ty
    NW: gl.constexpr = gl.num_warps()
    NP: gl.constexpr = (N + 15) // 16 * 16
    S: gl.constexpr = 8 if BITS <= 3 else 4
    Q: gl.constexpr = BK // W
    R: gl.constexpr = S * W // BK
    TILES: gl.constexpr = (K + S * W - 1) // (S * W)
    AHEAD: gl.constexpr = STAGES - 1
    RING: gl.constexpr = (AHEAD + R - 1) // R + 1
    SHARE: gl.constexpr = min(S, GROUP // W)  # slots of a tile that share a scale
    RUN: gl.constexpr = min(Q, SHARE)  # and of a stage
    PLANE: gl.constexpr = BITS == 3 or BITS == 6  # a byte for each word
    KEEP: gl.constexpr = BN * BM <= 64 * 32 * NW  # the words of a tile, where sums leave registers for them
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    PAIRS: gl.constexpr = gl.DotOperandLayout(0, MMA, 1)
    ROWS: gl.constexpr = gl.SliceLayout(1, PAIRS)
    H: gl.constexpr = W // 2
    U: gl.constexpr = W // 4 if PLANE else H
    XL: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [NW, 1], [1, 0])
    WL: gl.constexpr = gl.BlockedLayout([1, 4], [256 // W, W // 8], [NW, 1], [1, 0])
    UL: gl.constexpr = gl.BlockedLayout([1, 4], [128 // U, U // 4], [NW, 1], [1, 0])
    SL: gl.constexpr = gl.BlockedLayout([8], [32], [NW], [0])
    ZL: gl.constexpr = gl.BlockedLayout([16], [32], [NW], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_smem: gl.constexpr = gl.SwizzledSharedLayout(4, 64 // W, W // 8, [1, 0])
    u_smem: gl.constexpr = gl.SwizzledSharedLayout(4, 32 // U, U // 4, [1, 0])
    x_smem: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    xs = gl.allocate_shared_memory(DTYPE, [STAGES, BM, BK], x_smem)
    ws = gl.allocate_shared_memory(gl.int32, [RING, BN, H], w_smem)
    us = ws
    if BITS == 8 or PLANE:
        us = gl.allocate_shared_memory(gl.int32, [RING, BN, U], u_smem)
    ss = gl.allocate_shared_memory(gl.float16, [RING, S // SHARE * BN], flat)
    zs = gl.allocate_shared_memory(gl.uint8, [RING, S // SHARE * BN], flat)
    first = words + gl.multiple_of(gl.load(place) // 2, 4)
    second = words + gl.multiple_of(gl.load(place + 1) // (4 if PLANE else 2), 4)
    scales = halves + gl.multiple_of(gl.load(place + 2), 8)
    zeros = bytes + gl.multiple_of(gl.load(place + 3), 16)
    group = gl.load(place + 5).to(gl.int32)
    if UNIFORM:
        group = GROUP
    x_k = gl.arange(0, BK, layout=gl.SliceLayout(0, XL))[None, :]
    x_at = gl.convert_layout(x_row, gl.SliceLayout(1, XL))[:, None] + x_k
    x_k = x_k + gl.zeros([BM, BK], gl.int32, XL)
    rows = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, WL))
    w_at = rows[:, None] * H + gl.arange(0, H, layout=gl.SliceLayout(0, WL))[None, :]
    w_there = w_at < NP * H
    u_rows = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, UL))
    u_at = u_rows[:, None] * U + gl.arange(0, U, layout=gl.SliceLayout(0, UL))[None, :]
    u_there = u_at < NP * U
    s_at = gl.arange(0, S // SHARE * BN, layout=SL)
    z_at = gl.arange(0, S // SHARE * BN, layout=ZL)
    s_k = s_at // BN * (SHARE * W)
    z_k = z_at // BN * (SHARE * W)
    s_at = n0 + s_at % BN
    z_at = n0 + z_at % BN
    for early in gl.static_range(AHEAD):
        fetch(early, first, second, scales, zeros, x, x_at, x_k, xs, ws, us, ss, zs, w_at, w_there, u_at, u_there, s_at,
              z_at, s_k, z_k, group, BITS, NP, K, W, R, BN, BK, STAGES, RING, SPARSE)  # fmt: skip
    acc = gl.zeros([BN, BM], gl.float32, MMA)
    # from 0, told so late that a loop of one tile stays a loop: Triton 3.6 cannot compile what is left of it else
    for t in range(gl.program_id(2), TILES):
        at = t % RING
        for r in gl.static_range(R):
            i = t * R + r
            async_copy.wait_group(AHEAD - 1)
            fence_async_shared()
            for q in gl.static_range(Q):
                if q % RUN == 0:
                    zero = zs.index(at).slice((r * Q + q) // SHARE * BN, BN).load(ROWS)
                    scale = ss.index(at).slice((r * Q + q) // SHARE * BN, BN).load(ROWS)
                    less = less_of(zero, BITS, r * Q + q, RUN, DTYPE)
                    times = twice(scale.to(gl.float32).to(DTYPE))
                if not KEEP or (r == 0 and q == 0):
                    lo = ws.index(at).load(PAIRS)
                    hi = lo
                    if BITS == 8:
                        hi = us.index(at).load(PAIRS)
                    elif PLANE:
                        hi = widened(us.index(at).load(PAIRS), PAIRS)
                a = unpacked(lo, hi, less[:, None], times[:, None], BITS, r * Q + q, RUN, DTYPE, A)
                x_q = xs.index(i % STAGES).permute((1, 0)).slice(q * W, W, dim=0)
                acc = warpgroup_mma(a, x_q, acc, is_async=True)
                if q == Q - 1:  # the stage that this overwrites has been multiplied, two products are on their way
                    fetch(i + AHEAD, first, second, scales, zeros, x, x_at, x_k, xs, ws, us, ss, zs, w_at, w_there,
                          u_at, u_there, s_at, z_at, s_k, z_k, group, BITS, NP, K, W, R, BN, BK, STAGES,
                          RING, SPARSE)  # fmt: skip
                acc = warpgroup_mma_wait(1, deps=[acc])
    acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)
    barrier()
    return acc


@gluon.jit
def one(e, p, table, words, bytes, halves, n0, x, x_row, E: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
        W: gl.constexpr, GROUP: gl.constexpr, UNIFORM: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr,
        WIDTHS: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr, DEPTH: gl.constexpr,
        MMA: gl.constexpr):  # fmt: skip
    """Rows n0 … of expert e's matrix number p times the activations: [BN, BM], float32."""
    place = table + (p * E + e) * 6
    bits = gl.load(place + 4)
    acc = gl.zeros([BN, BM], gl.float32, MMA)
    for B in gl.static_range(2, 9):
        if (WIDTHS >> B) & 1:  # noqa: SIM102
            if bits == B:  # not known when this is compiled: no `and`
                acc = product_of(place, words, bytes, halves, n0, x, x_row, B, N, K, W, GROUP, UNIFORM, BN, BM,
                                 STAGES * DEPTH // inputs_of(B, W, DEPTH), SPARSE, inputs_of(B, W, DEPTH),
                                 MMA)  # fmt: skip
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
def tile(e, start, end, n0, x, h, table, words, bytes, halves, bias_gate, bias_up, sorted_pairs,
         LONE: gl.constexpr, P: gl.constexpr, CHOICES: gl.constexpr, E: gl.constexpr, N: gl.constexpr,
         K: gl.constexpr, W: gl.constexpr, GROUP: gl.constexpr, UNIFORM: gl.constexpr, GATED: gl.constexpr,
         ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, BIAS: gl.constexpr, WIDTHS: gl.constexpr,
         BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr,
         DEPTH: gl.constexpr):  # fmt: skip
    """One tile of h[pair]: act(gate x) * (up x) by matrices P, P + 1; ACT == 0: matrix P of x, without bias."""
    NW: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NW, 1], [16, BM, 16])
    XL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [NW, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, NW], [0, 1])
    i = start + gl.arange(0, BM, layout=gl.SliceLayout(1, XL))
    if LONE:
        x_row = gl.where(i < end, i, 0) * K  # rows that are not there: the first
    else:
        x_row = gl.load(sorted_pairs + i, mask=i < end, other=0) // CHOICES * K
    if SPARSE:
        x_row = gl.where(i < end, x_row, NOBODY)
    SIDES: gl.constexpr = 2 if ACT > 0 and GATED else 1
    if SIDES == 2:
        turned = gl.allocate_shared_memory(h.dtype.element_ty, [BM, BN], gl.NVMMASharedLayout(128, 16, 2))
    y = gl.zeros([BN, BM], gl.float32, MMA)
    for side in range(0, SIDES):  # gate, which then waits in shared memory, and up
        if SIDES == 2:  # noqa: SIM102
            if side == 1:  # not known when this is compiled: no `and`
                turned.permute((1, 0)).store(y.to(h.dtype.element_ty))
        y = one(e, P + side, table, words, bytes, halves, n0, x, x_row, E, N, K, W, GROUP, UNIFORM, BN, BM,
                WIDTHS, STAGES, SPARSE, DEPTH, MMA)  # fmt: skip
    if ACT > 0:
        gate = y
        if GATED:
            gate = turned.permute((1, 0)).load(MMA).to(gl.float32)
        if BIAS:
            m = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, MMA))
            y += gl.load(bias_up + e * N + m, mask=m < N, other=0.0).to(gl.float32)[:, None]
            if GATED:
                gate += gl.load(bias_gate + e * N + m, mask=m < N, other=0.0).to(gl.float32)[:, None]
        y = gated(gate, y, GATED, ACT, ALPHA, LIMIT)
    if SIDES == 1:  # where what was multiplied lay
        turned = gl.allocate_shared_memory(h.dtype.element_ty, [BM, BN], gl.NVMMASharedLayout(128, 16, 2))
    turned.permute((1, 0)).store(y.to(h.dtype.element_ty))
    barrier()
    j = start + gl.arange(0, BM, layout=gl.SliceLayout(0, OUT))
    n = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, OUT))
    pair = j
    if not LONE:
        pair = gl.load(sorted_pairs + j, mask=j < end, other=0)
    to = pair.to(gl.int64)[None, :] * N + n[:, None]
    gl.store(h + to, turned.permute((1, 0)).load(OUT), mask=(j < end)[None, :] & (n < N)[:, None])


@gluon.jit(do_not_specialize=["rows"])
def many(x, h, table, words, bytes, halves, bias_gate, bias_up, sorted_pairs, tile_expert, tile_start, tile_end,
         rows, LONE: gl.constexpr, P: gl.constexpr, CHOICES: gl.constexpr, E: gl.constexpr, N: gl.constexpr,
         K: gl.constexpr, W: gl.constexpr, GROUP: gl.constexpr, UNIFORM: gl.constexpr, GATED: gl.constexpr,
         ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, BIAS: gl.constexpr, WIDTHS: gl.constexpr,
         TILE: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr,
         DEPTH: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """BM pairs of a tile of TILE times BN rows; where fewer are left, a half, a quarter or (of 256) an eighth of them.

    A stage is of at most DEPTH inputs; SPARSE: nothing is read for a tile's places without a pair.
    LONE: there is one matrix, and a pair is one of the `rows` of x.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
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
    left = end - start
    LEAST: gl.constexpr = max(8, min(32, BM // 4))
    if e >= 0:
        for s in gl.static_range(4):
            if BM >> s >= LEAST:  # noqa: SIM102
                if left > (BM >> s + 1 if BM >> s > LEAST else 0):  # noqa: SIM102
                    if left <= (BM >> s if s > 0 else MOST):  # not known when this is compiled: no `and`
                        tile(e, start, end, n0, x, h, table, words, bytes, halves, bias_gate, bias_up, sorted_pairs,
                             LONE, P, CHOICES, E, N, K, W, GROUP, UNIFORM, GATED, ACT, ALPHA, LIMIT, BIAS, WIDTHS, BN,
                             BM >> s, STAGES, SPARSE, DEPTH)  # fmt: skip
