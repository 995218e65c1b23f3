"""The Triton kernels themselves: products of gathered activations with matrices of any width, read from the arena.

A program makes BM pairs (token, choice) of one expert times BN rows of its matrices. The weights are the left operand
of the tensor cores, made in registers from the words (`kernels/arena.py`): one shift and one mask that also sets the
exponent of 128 (bf16) or 1024 (fp16) give two codes plus that base; at an exponent lower by n, a code n bits further up
needs no shift (`left_at`, used by the Gluon kernels). Of few pairs there are few sums, so there (LATE) the tensor cores
multiply just that, and a group's sum loses base and zero point and gets its scale afterwards; else each weight does, by
a subtraction and a multiplication for two. Few pairs also leave most of the GPU idle, so there SPLIT programs share a
reduction and the next kernel adds their parts. Nothing is added atomically: every run gives the same bits.

WIDTHS is the set of arena widths in use, as bits of an integer, so that only their loops are compiled. PTX chooses
NVIDIA's packed instructions; without it plain Triton operations do the same (other GPUs, the interpreter).
"""

# mypy: ignore-errors
# (what stands below is Triton's language, not Python's)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mopeq.kernels import arena

SILU, GELU, GELU_TANH, RELU, CLAMPED = (tl.constexpr(i) for i in range(1, 6))


pieces = triton.constexpr_function(arena.pieces)


@triton.constexpr_function
def left_at(bits, slot, run, room):
    """The bit of a mantissa of `room` bits at which a slot's code may be left: the same for the `run` slots that share
    a scale, since what is to be taken off their sum depends on it."""
    found = set()
    for other in range(slot // run * run, slot // run * run + run):
        plane, first, _, _ = pieces(bits, other)[0]
        at = first % (4 if plane else 8)
        found.add(at if at + bits <= room else 0)
    return found.pop() if len(found) == 1 else 0


@triton.constexpr_function
def unpack_asm(bits, slot, bf16, scaled, pairs, left=0):
    """PTX that makes two weights of a slot, or, unless `scaled`, their codes plus the base; codes are `left` at a bit.

    $1 two words, $2 their second plane, and if scaled $3 two of -(base + zero), $4 two scales -> $0 two weights. With
    `pairs` the results are $0 and $1, and all else follows.
    8 bits in bf16 exceed the mantissa, so there each half of the code is made apart and $3 is -zero.
    """
    kind, one = ("bf16x2", "0x3F803F80") if bf16 else ("f16x2", "0x3C003C00")
    base = f"0x{(0x4300 - (left << 7) if bf16 else 0x6400 - (left << 10)) * 0x10001:08X}"
    names = ["{$0, $1}", "$2", "$3", "$4", "$5"] if pairs else ["$0", "$1", "$2", "$3", "$4"]
    lines = ["{ .reg .b32 t, u, one, minus, sixteen;"]
    second = names[2]
    wide = bits == 8 and bf16
    started = False
    for piece in pieces(bits, slot):
        to = 0 if wide else piece[3] + left
        mask = ((1 << piece[2]) - 1) << to
        both = f"0x{mask << 16 | mask:08X}"
        move = piece[1] - to
        lines.append(f"sh{'r' if move >= 0 else 'l'}.b32 u, {second if piece[0] else names[1]}, {abs(move)};")
        into, onto = "u" if wide and started else "t", "t" if started and not wide else base
        lines.append(f"lop3.b32 {into}, u, {both}, {onto}, 0xEA;")
        started = True
    lines.append(f"mov.b32 one, {one};")
    if wide:
        lines.append("mov.b32 minus, 0xC300C300; mov.b32 sixteen, 0x41804180;")
        lines.append(f"fma.rn.{kind} u, u, one, minus; fma.rn.{kind} t, t, one, minus;")
        lines.append(f"fma.rn.{kind} u, u, sixteen, {names[3]}; fma.rn.{kind} t, t, one, u;")
    elif scaled:
        lines.append(f"fma.rn.{kind} t, t, one, {names[3]};")
    if scaled:
        lines.append(f"mov.b32 u, 0x80008000; fma.rn.{kind} t, t, {names[4]}, u;")
    lines.append(f"mov.b32 {names[0]}, t; }}")
    return " ".join(lines)


@triton.jit
def code_of(words, second, BITS: tl.constexpr, SLOT: tl.constexpr):
    """The codes of one slot, int32, by plain operations."""
    code = words.to(tl.int32) * 0
    for i in tl.static_range(len(pieces(BITS, SLOT))):
        PIECE: tl.constexpr = pieces(BITS, SLOT)[i]
        plane = words
        if PIECE[0] == 1:
            plane = second
        code = code | (((plane.to(tl.int32) & 0xFFFF) >> PIECE[1]) & ((1 << PIECE[2]) - 1)) << PIECE[3]
    return code


@triton.jit
def unpack(words, second, less, times, BITS: tl.constexpr, SLOT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The weights of one slot: (code - zero) * scale. `less` as `subtrahend` made it, `times` the scale."""
    if not PTX:
        w = ((code_of(words, second, BITS, SLOT) + less.to(tl.float32)) * times.to(tl.float32)).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        w = tl.inline_asm_elementwise(unpack_asm(BITS, SLOT, True, True, False), "=r,r,r,r,r",
                                      [words, second, less, times], dtype=tl.bfloat16, is_pure=True,
                                      pack=2)  # fmt: skip
    else:
        w = tl.inline_asm_elementwise(unpack_asm(BITS, SLOT, False, True, False), "=r,r,r,r,r",
                                      [words, second, less, times], dtype=tl.float16, is_pure=True,
                                      pack=2)  # fmt: skip
    return w


@triton.jit
def unpack_late(words, second, BITS: tl.constexpr, SLOT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The codes of one slot, plus the base where `subtrahend` takes that off; and ones in the same shape.

    The ones are made from the words too, so that Triton lays them out as the codes and reads activations once.
    """
    if not PTX:
        code = code_of(words, second, BITS, SLOT)
        w = code.to(DTYPE)
        one = (code * 0 + 1).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        w = tl.inline_asm_elementwise(unpack_asm(BITS, SLOT, True, False, False), "=r,r,r", [words, second],
                                      dtype=tl.bfloat16, is_pure=True, pack=2)  # fmt: skip
        one = tl.inline_asm_elementwise("mov.b32 $0, 0x3F803F80;", "=r,r,r", [words, second], dtype=tl.bfloat16,
                                        is_pure=True, pack=2)  # fmt: skip
    else:
        w = tl.inline_asm_elementwise(unpack_asm(BITS, SLOT, False, False, False), "=r,r,r", [words, second],
                                      dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
        one = tl.inline_asm_elementwise("mov.b32 $0, 0x3C003C00;", "=r,r,r", [words, second], dtype=tl.float16,
                                        is_pure=True, pack=2)  # fmt: skip
    return w, one


@triton.jit
def subtrahend(zero, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Minus the zero point, and minus the base where unpacking leaves that in; float32."""
    base: tl.constexpr = 0.0 if not PTX else 1024.0 if tl.bfloat16 != DTYPE else 0.0 if BITS == 8 else 128.0
    return -base - zero.to(tl.float32)


@triton.jit
def shifted(words, bits, PTX: tl.constexpr):
    """int16 words shifted right by a number of bits known at run time; what enters from above is never looked at."""
    if PTX:
        by = tl.broadcast_to(bits, words.shape)
        words = tl.inline_asm_elementwise("shr.b32 $0, $1, $2;", "=r,r,r,r", [words, by], dtype=tl.int16, is_pure=True,
                                          pack=2)  # fmt: skip
    else:
        words = ((words.to(tl.int32) & 0xFFFF) >> bits).to(tl.int16)
    return words


@triton.jit
def product_of(acc, place, part, words, bytes, halves, n, x, x_row, x_ok, BITS: tl.constexpr, N: tl.constexpr,
               K: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, UNIFORM: tl.constexpr, SPLIT: tl.constexpr,
               BN: tl.constexpr, BM: tl.constexpr, SLOTS: tl.constexpr, PTX: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """acc [BN, BM] plus rows n of one matrix times activations x_row, over part `part` of SPLIT of the inputs.

    At most SLOTS slots of a tile are taken at a time, so that the activations of an iteration fit the shared memory.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    NP: tl.constexpr = (N + 15) // 16 * 16
    S: tl.constexpr = 8 if BITS <= 3 else 4
    Q: tl.constexpr = min(S, SLOTS)
    TILES: tl.constexpr = (K + S * W - 1) // (S * W)
    STEPS: tl.constexpr = (TILES * (S // Q) + SPLIT - 1) // SPLIT
    RUN: tl.constexpr = min(Q, GROUP // W)  # slots that share a scale
    WHOLE: tl.constexpr = K % (Q * W * SPLIT) == 0
    FULL: tl.constexpr = WHOLE and NP % BN == 0  # nothing is masked
    EVEN: tl.constexpr = UNIFORM and (Q * W) % GROUP == 0
    LATE: tl.constexpr = BM <= 8 and (BITS < 8 or tl.bfloat16 != DTYPE)
    first = words + tl.multiple_of(tl.load(place), 8)
    at_second = tl.multiple_of(tl.load(place + 1), 8)
    scales = halves + tl.multiple_of(tl.load(place + 2), 8) + n
    zeros = bytes + tl.multiple_of(tl.load(place + 3), 16) + n
    group = tl.load(place + 5).to(tl.int32)
    if UNIFORM:
        group = GROUP
    w = tl.arange(0, W)
    of_tile = n[:, None] * W + w[None, :]
    x_at = x_row[None, :] + w[:, None]
    for i in tl.range(0, STEPS, num_stages=STAGES):
        step = part * STEPS + i
        at = of_tile + (step // (S // Q)) * (NP * W)
        k0 = step * (Q * W)
        rows = NP
        if not WHOLE:
            rows = tl.where(k0 < K, NP, 0)  # and no `&` with a scalar, which Triton 3.9's interpreter gets wrong
        there = (n < rows)[:, None]
        lo = tl.load(first + at, mask=there, other=0)
        hi = lo
        if BITS == 8:
            hi = tl.load(words + at_second + at, mask=there, other=0)
        elif BITS == 3 or BITS == 6:
            of_bytes = n[:, None] * (W // 2) + tl.arange(0, W // 2)[None, :] + (step // (S // Q)) * (NP * W // 2)
            both = tl.load(words + tl.multiple_of(at_second // 2, 8) + of_bytes, mask=there, other=0)
            hi = tl.join(both, both >> 8).permute(0, 2, 1).reshape(both.shape[0], W)  # and whatever above a byte
        if Q < S:
            sub = step % (S // Q)
            lo = shifted(lo, sub * (4 if BITS == 2 else 8), PTX)  # slots 4 … 7 to where 0 … 3 were
            if BITS == 3:
                hi = shifted(hi, sub * 4, PTX)
        for r in tl.static_range(Q // RUN):
            k = k0 + r * (RUN * W)
            s_there = n < NP
            if not WHOLE:
                s_there = n < tl.where(k < K, NP, 0)
            if EVEN:
                zero_at = zeros + (k0 // GROUP) * NP + r * (RUN * W // GROUP * NP)  # constant steps from one place
                scale_at = scales + (k0 // GROUP) * NP + r * (RUN * W // GROUP * NP)
            else:
                zero_at = zeros + (k // group) * NP
                scale_at = scales + (k // group) * NP
            if FULL:
                zero = tl.load(zero_at)
                scale = tl.load(scale_at).to(tl.float32)
            else:
                zero = tl.load(zero_at, mask=s_there, other=0)
                scale = tl.load(scale_at, mask=s_there, other=0.0).to(tl.float32)
            less = subtrahend(zero, BITS, DTYPE, PTX)
            if LATE:
                sums = tl.zeros([BN, BM], tl.float32)
                counts = tl.zeros([BN, BM], tl.float32)
            else:
                less_each = tl.broadcast_to(less.to(DTYPE)[:, None], [BN, W])
                times_each = tl.broadcast_to(scale.to(DTYPE)[:, None], [BN, W])
            for j in tl.static_range(RUN):  # slot r * RUN + j of every word
                k = k0 + (r * RUN + j) * W
                if WHOLE:
                    x_tile = tl.load(x + x_at + k, mask=x_ok[None, :], other=0.0)
                else:
                    x_tile = tl.load(x + x_at + k, mask=x_ok[None, :] & (k + w < K)[:, None], other=0.0)
                if LATE:
                    a, one = unpack_late(lo, hi, BITS, r * RUN + j, DTYPE, PTX)
                    sums = tl.dot(a, x_tile, sums)
                    counts = tl.dot(one, x_tile, counts)
                else:
                    a = unpack(lo, hi, less_each, times_each, BITS, r * RUN + j, DTYPE, PTX)
                    acc = tl.dot(a, x_tile, acc)
            if LATE:
                acc += scale[:, None] * (sums + less[:, None] * counts)
    return acc


@triton.jit
def one(e, p, part, table, words, bytes, halves, n, x, x_row, x_ok, E: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
        W: tl.constexpr, GROUP: tl.constexpr, UNIFORM: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
        BM: tl.constexpr, SLOTS: tl.constexpr, WIDTHS: tl.constexpr, PTX: tl.constexpr,
        STAGES: tl.constexpr):  # fmt: skip
    """Rows n of expert e's matrix number p times the activations: [BN, BM], float32."""
    place = table + (p * E + e) * 6
    bits = tl.load(place + 4)
    acc = tl.zeros([BN, BM], tl.float32)
    for B in tl.static_range(2, 9):
        if (WIDTHS >> B) & 1:  # noqa: SIM102
            if bits == B:  # not known when this is compiled: no `and`
                acc = product_of(acc, place, part, words, bytes, halves, n, x, x_row, x_ok, B, N, K, W, GROUP, UNIFORM,
                                 SPLIT, BN, BM, SLOTS, PTX, STAGES)  # fmt: skip
    return acc


@triton.jit
def members(t, ids, pairs, sorted_pairs, tile_expert, tile_start, tile_end, E: tl.constexpr, BM: tl.constexpr,
            SCAN: tl.constexpr):  # fmt: skip
    """Tile t's expert (or -1), its pairs [BM] and which of them there are.

    SCAN > 0 (few pairs, that many at most): tile t belongs to pair t if its rank among its expert's pairs is a
    multiple of BM; every program looks for itself. Else `routing` has written the tiles.
    """
    j = tl.arange(0, BM)
    if SCAN:
        i = tl.arange(0, SCAN)
        all_ids = tl.load(ids + i, mask=i < pairs, other=-1).to(tl.int32)
        e = tl.load(ids + t).to(tl.int32)
        same = (all_ids == e) & (i < pairs)
        mine = tl.sum((same & (i < t)).to(tl.int32), 0)
        if (e < 0) | (e >= E) | (mine % BM != 0):
            e = -1
        rank = tl.cumsum(same.to(tl.int32), 0) - 1 - mine
        hit = same[None, :] & (rank[None, :] == j[:, None])
        pair = tl.sum(tl.where(hit, i[None, :], 0), 1)
        ok = tl.sum(hit.to(tl.int32), 1) > 0
    else:
        e = tl.load(tile_expert + t)
        at = tl.load(tile_start + t) + j
        ok = at < tl.load(tile_end + t)  # of an empty tile, none
        pair = tl.load(sorted_pairs + at, mask=ok, other=0)
    return e, pair, ok


@triton.jit
def gate_value(g, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The gate function of g, float32."""
    if ACT == SILU:
        value = g * tl.sigmoid(g)
    elif ACT == GELU:
        value = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACT == GELU_TANH:
        value = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    elif ACT == RELU:
        value = tl.maximum(g, 0.0)
    else:
        clamped = tl.minimum(g, LIMIT)
        value = clamped * tl.sigmoid(ALPHA * clamped)
    return value


@triton.jit
def activated(g, u, GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The inputs of `down` from the outputs of gate and up, or of up alone."""
    if not GATED:
        value = gate_value(u, ACT, ALPHA, LIMIT)
    elif ACT == CLAMPED:
        value = gate_value(g, ACT, ALPHA, LIMIT) * (tl.minimum(tl.maximum(u, -LIMIT), LIMIT) + 1.0)
    else:
        value = gate_value(g, ACT, ALPHA, LIMIT) * u
    return value


@triton.jit(do_not_specialize=["pairs"])
def upper(x, h, parts, table, words, bytes, halves, bias_gate, bias_up, ids, pairs, sorted_pairs, tile_expert,
          tile_start, tile_end, CHOICES: tl.constexpr, E: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
          W: tl.constexpr, GROUP: tl.constexpr, UNIFORM: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
          ALPHA: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr, FUSED: tl.constexpr, WIDTHS: tl.constexpr,
          SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SLOTS: tl.constexpr, SCAN: tl.constexpr,
          PTX: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """FUSED: h[pair] = act(gate x) * (up x). Else parts[p * SPLIT + s, pair], without biases, for `gating`."""
    if EARLY:
        gdc_launch_dependents()
    e, pair, ok = members(tl.program_id(1), ids, pairs, sorted_pairs, tile_expert, tile_start, tile_end, E, BM, SCAN)
    if e >= 0:
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        x_row = (pair // CHOICES).to(tl.int64) * K
        to = pair.to(tl.int64)[None, :] * N + n[:, None]
        there = ok[None, :] & (n < N)[:, None]
        if FUSED:
            g = tl.zeros([BN, BM], tl.float32)
            u = tl.zeros([BN, BM], tl.float32)
            for p in range(0, 2 if GATED else 1):  # gate, then up
                g = u
                u = one(e, p, 0, table, words, bytes, halves, n, x, x_row, ok, E, N, K, W, GROUP, UNIFORM, 1, BN, BM,
                        SLOTS, WIDTHS, PTX, STAGES)  # fmt: skip
            if BIAS:
                u += tl.load(bias_up + e * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
                if GATED:
                    g += tl.load(bias_gate + e * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
            tl.store(h + to, activated(g, u, GATED, ACT, ALPHA, LIMIT).to(h.dtype.element_ty), mask=there)
        else:
            z = tl.program_id(2)
            acc = one(e, z // SPLIT, z % SPLIT, table, words, bytes, halves, n, x, x_row, ok, E, N, K, W, GROUP,
                      UNIFORM, SPLIT, BN, BM, SLOTS, WIDTHS, PTX, STAGES)  # fmt: skip
            tl.store(parts + z.to(tl.int64) * pairs * N + to, acc, mask=there)


@triton.jit(do_not_specialize=["pairs"])
def gating(parts, h, bias_gate, bias_up, ids, pairs, E: tl.constexpr, N: tl.constexpr, GATED: tl.constexpr,
           ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
           BN: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """h[pair] from the parts that `upper` left. The pairs' experts are known before that has ended."""
    if EARLY:
        gdc_launch_dependents()
    pair = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    e = tl.load(ids + pair)
    if EARLY:
        gdc_wait()
    mine = n < tl.where((e >= 0) & (e < E), N, 0)
    g = tl.zeros([BN], tl.float32)
    u = tl.zeros([BN], tl.float32)
    size = pairs.to(tl.int64) * N
    at = parts + pair.to(tl.int64) * N + n
    for s in tl.static_range(SPLIT):
        u += tl.load(at + ((SPLIT if GATED else 0) + s) * size, mask=mine, other=0.0)
        if GATED:
            g += tl.load(at + s * size, mask=mine, other=0.0)
    if BIAS:
        u += tl.load(bias_up + e * N + n, mask=mine, other=0.0).to(tl.float32)
        if GATED:
            g += tl.load(bias_gate + e * N + n, mask=mine, other=0.0).to(tl.float32)
    tl.store(h + pair.to(tl.int64) * N + n, activated(g, u, GATED, ACT, ALPHA, LIMIT).to(h.dtype.element_ty), mask=mine)


@triton.jit
def warm(place, bytes, n0, N: tl.constexpr, K: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr):
    """Ask for BN rows of one matrix, so that they come while a kernel before still works: its words, second plane and
    scales, a cache line of 128 bytes for each i."""
    NP: tl.constexpr = (N + 15) // 16 * 16
    bits = tl.load(place + 4).to(tl.int32)
    slots = tl.where(bits <= 3, 8, 4)
    of_second = tl.where((bits == 3) | (bits == 6), 1, tl.where(bits == 8, 2, 0))
    tiles = (K + slots * W - 1) // (slots * W)
    i = tl.arange(0, 128)
    LINES: tl.constexpr = BN * W * 2 // 128
    start = bytes + tl.load(place) * 2 + n0 * (W * 2)
    second = bytes + tl.load(place + 1) * of_second + n0 * W * of_second
    for first in range(0, (K + 4 * W - 1) // (4 * W) * LINES, 128):
        at = (first + i) // LINES
        line = (first + i) % LINES * 128
        prefetch(start + at * (NP * W * 2) + line, (at < tiles) & (n0 * (W * 2) + line < NP * W * 2))
        prefetch(second + at * (NP * W * of_second) + line, (at < tiles) & (line < BN * W * of_second)
                 & (n0 * W * of_second + line < NP * W * of_second))  # fmt: skip
    scales = bytes + (tl.load(place + 2) + n0) * 2
    prefetch(scales + i * (NP * 2), i < (K + GROUP - 1) // GROUP)


@triton.jit
def prefetch(at, there):
    tl.inline_asm_elementwise("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
                              "=r,l,r", [at, there.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip


@triton.jit(do_not_specialize=["pairs"])
def lower(h, y, table, words, bytes, halves, ids, pairs, sorted_pairs, tile_expert, tile_start, tile_end,
          P: tl.constexpr, E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
          UNIFORM: tl.constexpr, WIDTHS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
          SLOTS: tl.constexpr, SCAN: tl.constexpr, PTX: tl.constexpr, STAGES: tl.constexpr,
          EARLY: tl.constexpr):  # fmt: skip
    """y[s, pair] = down h[pair], over part s of SPLIT of the inputs, without bias."""
    if EARLY:
        gdc_launch_dependents()
    e, pair, ok = members(tl.program_id(1), ids, pairs, sorted_pairs, tile_expert, tile_start, tile_end, E, BM, SCAN)
    if EARLY:
        if e >= 0:
            warm(table + (P * E + e) * 6, bytes, tl.program_id(0) * BN, N, K, W, GROUP, BN)
        gdc_wait()
    if e >= 0:
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        s = tl.program_id(2)
        acc = one(e, P, s, table, words, bytes, halves, n, h, pair.to(tl.int64) * K, ok, E, N, K, W, GROUP, UNIFORM,
                  SPLIT, BN, BM, SLOTS, WIDTHS, PTX, STAGES)  # fmt: skip
        to = s.to(tl.int64) * pairs * N + pair.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(y + to, acc.to(y.dtype.element_ty), mask=ok[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["pairs"])
def weighted_sum(y, weight, bias, ids, out, pairs, CHOICES: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
                 BIAS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """out[t] = sum over the token's choices, in their order, of weight * (y + bias); others' experts are left out."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN], tl.float32)
    for k in tl.static_range(CHOICES):
        e = tl.load(ids + t * CHOICES + k)
        ok = (e >= 0) & (e < E)
        mine = n < tl.where(ok, N, 0)
        value = tl.zeros([BN], tl.float32)
        for s in tl.static_range(SPLIT):
            at = y + s * pairs.to(tl.int64) * N + (t * CHOICES + k) * N + n
            value += tl.load(at, mask=mine, other=0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + e * N + n, mask=mine, other=0.0).to(tl.float32)
        acc += value * tl.load(weight + t * CHOICES + k, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + t * N + n, acc.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["pairs"])
def counting(ids, pairs, counts, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr):
    """counts[b, e]: how many of the pairs bC … bC + C - 1 are expert e's."""
    if EARLY:
        gdc_launch_dependents()
    b = tl.program_id(0)
    found, e, _ = members_of(ids, pairs, b, E, EP, C)
    tl.store(counts + b * EP + e, tl.sum(found, 0))


@triton.jit
def members_of(ids, pairs, b, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr):
    """[C, EP]: 1 where a pair of block b is an expert's; the experts 0 … EP - 1, the pairs' own."""
    i = b * C + tl.arange(0, C)
    e = tl.arange(0, EP)
    own = tl.load(ids + i, mask=i < pairs, other=-1).to(tl.int32)
    own = tl.where(own < E, own, -1)
    return (own[:, None] == e[None, :]).to(tl.int32), e, own


@triton.jit(do_not_specialize=["pairs", "blocks", "tiles"])
def sorting(ids, pairs, counts, blocks, tiles, sorted_pairs, tile_expert, tile_start, tile_end, E: tl.constexpr,
            EP: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Program b puts its pairs where they belong in the order of the experts, and writes some of the tiles.

    With s pairs of lower experts, e's tiles begin at s // BM + e; there are pairs // BM + E in all, some of them empty.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    found, e, own = members_of(ids, pairs, b, E, EP, C)
    J: tl.constexpr = max(8, min(64, 8192 // EP))
    j = tl.arange(0, J)
    all_of = tl.zeros([J, EP], tl.int32)
    earlier = tl.zeros([J, EP], tl.int32)
    at = 0
    while at < blocks:  # and not `range`, whose bounds may not be tensors in the interpreter
        of = tl.load(counts + (at + j)[:, None] * EP + e[None, :], mask=(at + j < blocks)[:, None], other=0)
        all_of += of
        earlier += tl.where((at + j < b)[:, None], of, 0)
        at += J
    count = tl.sum(all_of, 0)
    before = tl.sum(earlier, 0)
    start = tl.cumsum(count, 0) - count
    rank = tl.zeros([C], tl.int32)
    i = tl.arange(0, C)
    for first in tl.static_range(0, C, 64):
        k = first + tl.arange(0, 64)
        other = tl.load(ids + b * C + k, mask=b * C + k < pairs, other=-1).to(tl.int32)
        rank += tl.sum(((other[None, :] == own[:, None]) & (k[None, :] < i[:, None])).to(tl.int32), 1)
    to = tl.sum(found * (start + before)[None, :], 1) + rank
    tl.store(sorted_pairs + to, b * C + i, mask=own >= 0)
    first_tile = start // BM + e
    at = b * 64
    while at < tiles:
        t = at + tl.arange(0, 64)
        mine = tl.sum(((first_tile[None, :] <= t[:, None]) & (e < E)[None, :]).to(tl.int32), 1) - 1
        here = (mine[:, None] == e[None, :]).to(tl.int32)
        begin = tl.sum(here * (start - first_tile * BM)[None, :], 1) + t * BM
        end = tl.sum(here * (start + count)[None, :], 1)
        tl.store(tile_expert + t, tl.where(begin < end, mine, -1), mask=t < tiles)
        tl.store(tile_start + t, begin, mask=t < tiles)
        tl.store(tile_end + t, end, mask=t < tiles)
        at += 64 * tl.num_programs(0)
