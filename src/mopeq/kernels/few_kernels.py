"""Few tokens on NVIDIA GPUs: products of gathered activations with packed matrices, in Gluon, Triton's lower level.

A program makes BM pairs of one expert times HALVES * 64 rows of a matrix. Everything it reads arrives in shared memory
some tiles ahead: words, scales, zero points and activations. The tensor cores multiply codes plus the base of their
exponent (`unpack_asm`), and ones; a group's sum then loses base and zero point and gets its scale. SPLIT programs share
a reduction; the next kernel adds their parts in their order, or (LAST) the last of them to finish does.
"""

# mypy: ignore-errors
# (what stands below is Triton's language, not Python's)

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mopeq.kernels.hopper_kernels import barrier, copy
from mopeq.kernels.triton_kernels import left_at, unpack_asm

# right by 8 bits: of two shifts in a row the assembler would make one, and keep the word for it in more registers
BYTE = gl.constexpr("prmt.b32 $0, $1, 0, 0x4321;")

NOBODY = gl.constexpr(-(2**30))  # where activations lie for a tile's place without a pair


@triton.constexpr_function
def sizes(first, more):
    """The different numbers of outputs of a launch's matrices."""
    return tuple(sorted({first, *more}))


@triton.constexpr_function
def rows_before(first, more, i):
    """The outputs of the matrices before i."""
    return sum((first, *more)[:i])


@triton.constexpr_function
def blocks_before(first, more, i, size):
    """The programs, of `size` rows each, before those of matrix i."""
    return sum(-(-n // size) for n in (first, *more)[:i])


@gluon.jit
def added(a, b):
    return a + b


@gluon.jit
def members(t, ids, pairs, sorted_pairs, tile_expert, tile_start, tile_end, E: gl.constexpr, BM: gl.constexpr,
            SCAN: gl.constexpr):  # fmt: skip
    """`triton_kernels.members`; each warp looks for itself. SCAN < 0: there is one expert, and a pair is a token."""
    L: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [gl.num_warps(), 1], [1, 0])
    j = gl.arange(0, BM, layout=gl.SliceLayout(1, L))
    if SCAN < 0:
        e = 0
        pair = t * BM + j
        ok = (pair < pairs).to(gl.int32)
        pair = gl.where(pair < pairs, pair, 0)
    elif SCAN:
        i = gl.arange(0, SCAN, layout=gl.SliceLayout(0, L))
        own = gl.load(ids + i, mask=i < pairs, other=-1).to(gl.int32)
        e = gl.load(ids + t).to(gl.int32)
        same = gl.where(i < pairs, (own == e).to(gl.int32), 0)
        mine = gl.sum(gl.where(i < t, same, 0), 0)
        if (e < 0) | (e >= E) | (mine % BM != 0):
            e = -1
        all_same = same[None, :] + gl.zeros([BM, SCAN], gl.int32, L)
        rank = gl.associative_scan(all_same, 1, added) - 1 - mine
        hit = all_same * (rank == j[:, None]).to(gl.int32)
        pair = gl.sum(hit * i[None, :], 1)
        ok = gl.sum(hit, 1)
    else:
        e = gl.load(tile_expert + t)
        at = gl.load(tile_start + t) + j
        there = at < gl.load(tile_end + t)  # of an empty tile, none
        pair = gl.load(sorted_pairs + at, mask=there, other=0)
        ok = there.to(gl.int32)
    return e, pair, ok


@gluon.jit
def codes(words, second, BITS: gl.constexpr, SLOT: gl.constexpr, RUN: gl.constexpr, DTYPE: gl.constexpr):
    """Words [64, W] and their second plane -> the codes of a slot, plus their base."""
    if gl.bfloat16 == DTYPE:
        ASM: gl.constexpr = unpack_asm(BITS, SLOT, True, False, False, left_at(BITS, SLOT, RUN, 7))
        code = gl.inline_asm_elementwise(ASM, "=r,r,r", [words, second], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        ASM: gl.constexpr = unpack_asm(BITS, SLOT, False, False, False, left_at(BITS, SLOT, RUN, 10))
        code = gl.inline_asm_elementwise(ASM, "=r,r,r", [words, second], dtype=gl.float16, is_pure=True, pack=2)
    return code


@gluon.jit
def less_of(zero, BITS: gl.constexpr, SLOT: gl.constexpr, RUN: gl.constexpr, ROOM: gl.constexpr, TIMES: gl.constexpr):
    """Minus the base that `codes` leaves in, minus zero points [64]: [64, 1], float32."""
    EXPONENT: gl.constexpr = ROOM - left_at(BITS, SLOT, RUN, ROOM)
    if TIMES > 1:
        less = -TIMES * 2.0**EXPONENT - zero.to(gl.float32)
    else:  # a zero point is below the base, so it fits into the mantissa: one instruction instead of a conversion
        bits = zero.to(gl.int32) * 2 ** (23 - EXPONENT) + ((EXPONENT + 127) * 2**23 - 2**31)
        less = bits.to(gl.float32, bitcast=True)
    return less[:, None]


@gluon.jit
def shifted(words, ASM: gl.constexpr):
    """16-bit words shifted right, two at a time: what enters from above is never looked at."""
    return gl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2)


@gluon.jit
def widened(both, A: gl.constexpr):
    """16 bits that hold the bytes of words w and w + W / 2 [64, W / 2] -> [64, W], with whatever above a byte."""
    hi = gl.join(both, shifted(both, "shr.b32 $0, $1, 8;")).permute((0, 2, 1))
    return gl.convert_layout(hi.reshape([both.shape[0], both.shape[1] * 2]), A, assert_trivial=True)


@gluon.jit
def product_of(place, part, words, bytes, halves, n0, x, x_row, BITS: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
               W: gl.constexpr, GROUP: gl.constexpr, UNIFORM: gl.constexpr, SPLIT: gl.constexpr,
               HALVES: gl.constexpr, BM: gl.constexpr, SPARSE: gl.constexpr, STAGES: gl.constexpr,
               MMA: gl.constexpr, WAIT: gl.constexpr):  # fmt: skip
    """Rows n0 … of one matrix times activations x_row [BM], over part `part`: float32 [64, BM], the next 64 rows'."""
    DTYPE: gl.constexpr = x.dtype.element_ty
    NW: gl.constexpr = gl.num_warps()
    BN: gl.constexpr = 64 * HALVES
    NP: gl.constexpr = (N + 15) // 16 * 16
    S: gl.constexpr = 8 if BITS <= 3 else 4
    BK: gl.constexpr = S * W
    RUN: gl.constexpr = min(S, GROUP // W)  # slots that share a scale
    G: gl.constexpr = S // RUN
    TILES: gl.constexpr = (K + BK - 1) // BK
    STEPS: gl.constexpr = (TILES + SPLIT - 1) // SPLIT
    HELD: gl.constexpr = 4 if BITS == 3 else S  # slots unpacked from where they lie
    AHEAD: gl.constexpr = STAGES - 1
    PLANE: gl.constexpr = BITS == 3 or BITS == 6  # a byte for each word
    SLOT_BITS: gl.constexpr = 4 if BITS == 8 else BITS  # 8 bits: two times four
    TIMES: gl.constexpr = 17 if BITS == 8 else 1
    ROOM: gl.constexpr = 7 if gl.bfloat16 == DTYPE else 10  # bits of a mantissa
    FULL: gl.constexpr = NP % BN == 0
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    XL: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [NW, 1], [1, 0])
    WL: gl.constexpr = gl.BlockedLayout([1, 8], [256 // W, W // 8], [NW, 1], [1, 0])
    UL: gl.constexpr = gl.BlockedLayout([1, 8], [512 // W, W // 16], [NW, 1], [1, 0])
    SL: gl.constexpr = gl.BlockedLayout([8], [32], [NW], [0])
    ZL: gl.constexpr = gl.BlockedLayout([16], [32], [NW], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    xs = gl.allocate_shared_memory(DTYPE, [STAGES, BM, BK], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    w_smem: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // W, W // 8, [1, 0])
    ws = gl.allocate_shared_memory(gl.int16, [STAGES, BN, W], w_smem)
    us = ws
    if BITS == 8:
        us = gl.allocate_shared_memory(gl.int16, [STAGES, BN, W], w_smem)
    elif PLANE:
        us = gl.allocate_shared_memory(gl.int16, [STAGES, BN, W // 2], gl.SwizzledSharedLayout(8, 4, W // 16, [1, 0]))
    ss = gl.allocate_shared_memory(gl.float16, [STAGES, G * BN], flat)
    zs = gl.allocate_shared_memory(gl.uint8, [STAGES, G * BN], flat)
    at_words, at_second, at_scales, at_zeros, group = place
    first = words + at_words
    second = words
    if BITS == 8:
        second = words + at_second
    elif PLANE:
        second = words + gl.multiple_of(at_second // 2, 8)
    scales = halves + at_scales
    zeros = bytes + at_zeros
    if UNIFORM:
        group = GROUP
    begin = part * STEPS
    count = gl.minimum(STEPS, TILES - begin)
    x_k = gl.arange(0, BK, layout=gl.SliceLayout(0, XL))[None, :]
    x_at = gl.convert_layout(x_row, gl.SliceLayout(1, XL))[:, None] + x_k
    x_k = x_k + gl.zeros([BM, BK], gl.int32, XL)
    w_row = (n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, WL)))[:, None]
    w_at = w_row * W + gl.arange(0, W, layout=gl.SliceLayout(0, WL))[None, :]
    u_row = w_row
    u_at = w_at
    if PLANE:
        u_row = (n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, UL)))[:, None]
        u_at = u_row * (W // 2) + gl.arange(0, W // 2, layout=gl.SliceLayout(0, UL))[None, :]
    w_there = w_row < NP
    u_there = u_row < NP
    s_at = gl.arange(0, G * BN, layout=SL)
    z_at = gl.arange(0, G * BN, layout=ZL)
    s_k = s_at // BN * (RUN * W)
    z_k = z_at // BN * (RUN * W)
    s_at = n0 + s_at % BN
    z_at = n0 + z_at % BN
    for ahead in gl.static_range(AHEAD):  # the weights, which no kernel before makes; then what one may make
        if ahead < count:
            weights(begin + ahead, ahead, first, second, scales, zeros, ws, us, ss, zs, w_at, u_at, w_there,
                    u_there, s_at, z_at, s_k, z_k, group, BITS, FULL, NP, K, BK, W)  # fmt: skip
            if not WAIT:
                activations(begin + ahead, ahead, x, xs, x_at, x_k, K, BK, SPARSE)
        if not WAIT:
            async_copy.commit_group()
    if WAIT:
        gdc_wait()
        for ahead in gl.static_range(AHEAD):
            if ahead < count:
                activations(begin + ahead, ahead, x, xs, x_at, x_k, K, BK, SPARSE)
            async_copy.commit_group()
    acc = gl.zeros([64, BM], gl.float32, MMA)
    acc_2 = acc
    one = gl.full([64, W], 1.0, DTYPE, A)
    for i in range(0, count):
        async_copy.wait_group(AHEAD - 1)
        at = i % STAGES
        to = (i + AHEAD) % STAGES
        t = begin + i + AHEAD
        if i + AHEAD < count:
            weights(t, to, first, second, scales, zeros, ws, us, ss, zs, w_at, u_at, w_there,
                    u_there, s_at, z_at, s_k, z_k, group, BITS, FULL, NP, K, BK, W)  # fmt: skip
            activations(t, to, x, xs, x_at, x_k, K, BK, SPARSE)
        async_copy.commit_group()
        lo = ws.index(at).slice(0, 64, dim=0).load(A)
        lo_2 = lo
        if HALVES == 2:
            lo_2 = ws.index(at).slice(64, 64, dim=0).load(A)
        hi = lo
        hi_2 = lo_2
        if BITS == 8:
            hi = us.index(at).slice(0, 64, dim=0).load(A)
            if HALVES == 2:
                hi_2 = us.index(at).slice(64, 64, dim=0).load(A)
        elif PLANE:
            hi = widened(us.index(at).slice(0, 64, dim=0).load(MMA), A)
            if HALVES == 2:
                hi_2 = widened(us.index(at).slice(64, 64, dim=0).load(MMA), A)
        for r in gl.static_range(G):
            sums = gl.zeros([64, BM], gl.float32, MMA)
            sums_2 = sums
            high = sums
            high_2 = sums
            counts = sums
            for j in gl.static_range(RUN):
                if r * RUN + j == HELD:  # slots 4 … 7 to where 0 … 3 were, in the same registers
                    lo = shifted(lo, BYTE)
                    hi = shifted(hi, "shr.b32 $0, $1, 4;")
                    if HALVES == 2:
                        lo_2 = shifted(lo_2, BYTE)
                        hi_2 = shifted(hi_2, "shr.b32 $0, $1, 4;")
                b = xs.index(at).slice((r * RUN + j) * W, W, dim=1).permute((1, 0)).load(B)
                sums = mma_v2(codes(lo, hi, SLOT_BITS, (r * RUN + j) % HELD, RUN, DTYPE), b, sums)
                if BITS == 8:
                    high = mma_v2(codes(hi, hi, SLOT_BITS, r * RUN + j, RUN, DTYPE), b, high)
                if HALVES == 2:
                    sums_2 = mma_v2(codes(lo_2, hi_2, SLOT_BITS, (r * RUN + j) % HELD, RUN, DTYPE), b, sums_2)
                    if BITS == 8:
                        high_2 = mma_v2(codes(hi_2, hi_2, SLOT_BITS, r * RUN + j, RUN, DTYPE), b, high_2)
                counts = mma_v2(one, b, counts)
            scale = ss.index(at).slice(r * BN, 64, dim=0).load(ROWS).to(gl.float32)[:, None]
            less = less_of(zs.index(at).slice(r * BN, 64, dim=0).load(ROWS), SLOT_BITS, r * RUN, RUN, ROOM, TIMES)
            if BITS == 8:
                sums = sums + 16.0 * high
            acc += scale * (sums + less * counts)
            if HALVES == 2:
                scale = ss.index(at).slice(r * BN + 64, 64, dim=0).load(ROWS).to(gl.float32)[:, None]
                less = less_of(zs.index(at).slice(r * BN + 64, 64, dim=0).load(ROWS), SLOT_BITS, r * RUN, RUN, ROOM,
                               TIMES)  # fmt: skip
                if BITS == 8:
                    sums_2 = sums_2 + 16.0 * high_2
                acc_2 += scale * (sums_2 + less * counts)
    async_copy.wait_group(0)
    return acc, acc_2


@gluon.jit
def activations(t, to, x, xs, x_at, x_k, K: gl.constexpr, BK: gl.constexpr, SPARSE: gl.constexpr):
    """Begin copying tile t of the activations to stage `to`: zeros beyond K, and NOBODY's if SPARSE."""
    at = x_at + t * BK
    there = x_k + t * BK < K
    if SPARSE:
        there = (at >= 0) & there if K % BK else at >= 0
    copy(xs.index(to), x + at, there, SPARSE or K % BK != 0)


@gluon.jit
def weights(t, to, first, second, scales, zeros, ws, us, ss, zs, w_at, u_at, w_there, u_there, s_at, z_at,
            s_k, z_k, group, BITS: gl.constexpr, FULL: gl.constexpr, NP: gl.constexpr, K: gl.constexpr,
            BK: gl.constexpr, W: gl.constexpr):  # fmt: skip
    """Begin copying tile t of the matrix to stage `to`."""
    copy(ws.index(to), first + (w_at + t * (NP * W)), w_there, not FULL)
    if BITS == 8:
        copy(us.index(to), second + (w_at + t * (NP * W)), w_there, not FULL)
    elif BITS == 3 or BITS == 6:
        copy(us.index(to), second + (u_at + t * (NP * W // 2)), u_there, not FULL)
    k = t * BK
    WHOLE: gl.constexpr = FULL and K % BK == 0
    # what Triton cannot see for itself, and must to copy 4 bytes at a time: a group's rows lie together
    s_group = gl.max_constancy((s_k + k) // group, [16])
    z_group = gl.max_constancy((z_k + k) // group, [16])
    s_there = gl.max_constancy((s_k + k < K) & (s_at < NP), [16])
    z_there = gl.max_constancy((z_k + k < K) & (z_at < NP), [16])
    copy(ss.index(to), scales + (s_group * NP + s_at), s_there, not WHOLE)
    copy(zs.index(to), zeros + (z_group * NP + z_at), z_there, not WHOLE)


@gluon.jit(do_not_specialize=["pairs"])
def few(x, y, table, words, bytes, halves, ids, pairs, sorted_pairs, tile_expert, tile_start, tile_end, out,
        arrived, P: gl.constexpr, CHOICES: gl.constexpr, E: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
        W: gl.constexpr, GROUP: gl.constexpr, UNIFORM: gl.constexpr, WIDTHS: gl.constexpr, SPLIT: gl.constexpr,
        HALVES: gl.constexpr, BM: gl.constexpr, SPARSE: gl.constexpr, SCAN: gl.constexpr, STAGES: gl.constexpr,
        LAST: gl.constexpr, MORE: gl.constexpr, EARLY: gl.constexpr, WAIT: gl.constexpr,
        FIRST: gl.constexpr):  # fmt: skip
    """y[z, pair] = part z % SPLIT of matrix P + z // SPLIT of x[pair // CHOICES], without bias; z: the program's.

    LAST, for one matrix: out[pair] = the sum of the parts; `arrived` counts programs, and is 0 again afterwards. There
    it may be followed in the table by others with MORE outputs each, whose products come behind its own in y and out.
    """
    if WAIT and FIRST:  # the tiles come from the kernel before; those after rely on them without waiting
        gdc_wait()
    if EARLY:
        gdc_launch_dependents()
    e, pair, ok = members(gl.program_id(1), ids, pairs, sorted_pairs, tile_expert, tile_start, tile_end, E, BM, SCAN)
    if e >= 0:
        MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
        COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
        SIZES: gl.constexpr = sizes(N, MORE)
        ALL: gl.constexpr = rows_before(N, MORE, len(MORE) + 1)
        z = gl.program_id(2)
        n0 = gl.program_id(0) * (64 * HALVES)  # its first row
        n_end = N  # of its matrix
        column_0 = 0  # where the matrix' outputs begin
        which = P + z // SPLIT
        for i in gl.static_range(len(MORE)):
            begin = blocks_before(N, MORE, i + 1, 64 * HALVES)
            if gl.program_id(0) >= begin:
                n0 = (gl.program_id(0) - begin) * (64 * HALVES)
                n_end = MORE[i]
                column_0 = rows_before(N, MORE, i + 1)
                which = i + 1
        row = table + (which * E + e) * 6
        bits = gl.load(row + 4)
        place = (gl.multiple_of(gl.load(row), 8), gl.multiple_of(gl.load(row + 1), 8),
                 gl.multiple_of(gl.load(row + 2), 8), gl.multiple_of(gl.load(row + 3), 16),
                 gl.load(row + 5).to(gl.int32))  # fmt: skip
        acc = gl.zeros([64, BM], gl.float32, MMA)
        acc_2 = acc
        x_row = pair // CHOICES * K
        if SPARSE:
            x_row = gl.where(ok > 0, x_row, NOBODY)
        # plus a zero that is not known when this is compiled: Triton 3.6 fails at loops of which it sees the end
        part = z % SPLIT + (bits >> 8).to(gl.int32)
        for B in gl.static_range(2, 9):
            if (WIDTHS >> B) & 1:  # noqa: SIM102
                if bits == B:  # not known when this is compiled: no `and`
                    if len(SIZES) == 1:
                        acc, acc_2 = product_of(place, part, words, bytes, halves, n0, x, x_row, B, N, K, W, GROUP,
                                                UNIFORM, SPLIT, HALVES, BM, SPARSE,
                                                STAGES if B <= 3 else 2 * STAGES, MMA, WAIT)  # fmt: skip
                    else:
                        for i in gl.static_range(len(SIZES)):
                            if n_end == SIZES[i]:
                                acc, acc_2 = product_of(place, part, words, bytes, halves, n0, x, x_row, B,
                                                        SIZES[i], K, W, GROUP, UNIFORM, SPLIT, HALVES, BM, SPARSE,
                                                        STAGES if B <= 3 else 2 * STAGES, MMA, WAIT)  # fmt: skip
        n = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
        column = gl.convert_layout(pair, COLUMNS).to(gl.int64)
        there = gl.convert_layout(ok, COLUMNS)[None, :] > 0
        at = column[None, :] * ALL + (column_0 + n)[:, None]
        mask = there & (n < n_end)[:, None]
        to = y + z.to(gl.int64) * pairs * ALL + at
        if LAST and SPLIT == 1:
            to = out + at
        gl.store(to, acc.to(to.dtype.element_ty), mask=mask)
        if HALVES == 2:
            gl.store(to + 64, acc_2.to(to.dtype.element_ty), mask=there & (n + 64 < n_end)[:, None])
        if LAST and SPLIT > 1:
            barrier()  # so that one thread's release is every thread's
            counter = arrived + gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
            if gl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
                gl.store(counter, 0)
                for half in gl.static_range(HALVES):
                    mask = there & (n + 64 * half < n_end)[:, None]
                    total = gl.zeros([64, BM], gl.float32, MMA)
                    for s in gl.static_range(SPLIT):
                        total += gl.load(y + s * pairs.to(gl.int64) * ALL + at + 64 * half, mask=mask, other=0.0,
                                         cache_modifier=".cg")  # fmt: skip
                    gl.store(out + at + 64 * half, total.to(out.dtype.element_ty), mask=mask)
