"""The Triton kernels themselves: products of gathered activations with matrices of any width, read from the arena.

A program makes BM pairs (token, choice) of one expert times BN rows of its matrices. The weights are the left operand
of the tensor cores, unpacked in registers from the words (`kernels/arena.py`): one shift, one mask that also sets the
exponent of 128 (bf16) or 1024 (fp16), one subtraction of that and the zero point give two exact integers, one
multiplication two weights. Few pairs leave most of the GPU idle, so there SPLIT programs share a reduction and the next
kernel adds their parts. Nothing is added atomically: every run gives the same bits.

WIDTHS is the set of arena widths in use, as bits of an integer, so that only their loops are compiled. PTX chooses
NVIDIA's packed instructions; without it plain Triton operations do the same (other GPUs, the interpreter).
"""

# mypy: ignore-errors
# (what stands below is Triton's language, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

SILU, GELU, GELU_TANH, RELU, CLAMPED = (tl.constexpr(i) for i in range(1, 6))


@triton.constexpr_function
def unpack_asm(bits, low, slot, bf16):
    """PTX: $1 two words, $2 their second plane, $3 two of -(base + zero), $4 two scales -> $0 two weights.

    `low`: bits of a code in the words. 8 bits in bf16 exceed the mantissa, so there each half of the code is made apart
    and $3 is -zero.
    """
    kind, base, one = ("bf16x2", "0x43004300", "0x3F803F80") if bf16 else ("f16x2", "0x64006400", "0x3C003C00")
    high = bits - low

    def pair(mask):
        return f"0x{mask << 16 | mask:08X}"

    lines = ["{ .reg .b32 t, u, one;", f"mov.b32 one, {one};"]
    lines.append(f"shr.b32 t, $1, {slot * low};" if slot else "mov.b32 t, $1;")
    lines.append(f"lop3.b32 t, t, {pair(2**low - 1)}, {base}, 0xEA;")
    if high and not (bits == 8 and bf16):
        move = slot * high - low
        lines.append(f"sh{'r' if move >= 0 else 'l'}.b32 u, $2, {abs(move)};")
        lines.append(f"and.b32 u, u, {pair((2**high - 1) << low)};")
        lines.append("or.b32 t, t, u;")
    if bits == 8 and bf16:
        lines.insert(1, ".reg .b32 minus, sixteen; mov.b32 minus, 0xC300C300; mov.b32 sixteen, 0x41804180;")
        lines.append(f"shr.b32 u, $2, {slot * high};")
        lines.append(f"lop3.b32 u, u, {pair(15)}, {base}, 0xEA;")
        lines.append(f"fma.rn.{kind} u, u, one, minus; fma.rn.{kind} t, t, one, minus;")
        lines.append(f"fma.rn.{kind} u, u, sixteen, $3; fma.rn.{kind} t, t, one, u;")
    else:
        lines.append(f"fma.rn.{kind} t, t, one, $3;")
    lines.append(f"mov.b32 u, 0x80008000; fma.rn.{kind} t, t, $4, u;")
    lines.append("mov.b32 $0, t; }")
    return " ".join(lines)


@triton.jit
def unpack(words, second, less, times, BITS: tl.constexpr, SLOT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The weights of one slot: (code - zero) * scale. `less` as `subtrahend` made it, `times` the scale."""
    LOW: tl.constexpr = 2 if BITS <= 3 else 4
    if not PTX:
        code = ((words.to(tl.int32) & 0xFFFF) >> (SLOT * LOW)) & ((1 << LOW) - 1)
        if BITS > LOW:
            HIGH: tl.constexpr = BITS - LOW
            more = ((second.to(tl.int32) & 0xFFFF) >> (SLOT * HIGH)) & ((1 << HIGH) - 1)
            code = code | (more << LOW)
        w = ((code.to(tl.float32) + less.to(tl.float32)) * times.to(tl.float32)).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        w = tl.inline_asm_elementwise(unpack_asm(BITS, LOW, SLOT, True), "=r,r,r,r,r", [words, second, less, times],
                                      dtype=tl.bfloat16, is_pure=True, pack=2)  # fmt: skip
    else:
        w = tl.inline_asm_elementwise(unpack_asm(BITS, LOW, SLOT, False), "=r,r,r,r,r", [words, second, less, times],
                                      dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    return w


@triton.jit
def subtrahend(zero, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Minus the zero point, and minus the base where `unpack` leaves that in."""
    base: tl.constexpr = 0.0 if not PTX else 1024.0 if tl.bfloat16 != DTYPE else 0.0 if BITS == 8 else 128.0
    return (-base - zero.to(tl.float32)).to(DTYPE)


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
    LOW: tl.constexpr = 2 if BITS <= 3 else 4
    Q: tl.constexpr = min(S, SLOTS)
    TILES: tl.constexpr = (K + S * W - 1) // (S * W)
    STEPS: tl.constexpr = (TILES * (S // Q) + SPLIT - 1) // SPLIT
    RUN: tl.constexpr = min(Q, GROUP // W)  # slots that share a scale
    WHOLE: tl.constexpr = K % (Q * W * SPLIT) == 0
    first = words + tl.multiple_of(tl.load(place), 8)
    at_second = tl.multiple_of(tl.load(place + 1), 8)
    scales = halves + tl.multiple_of(tl.load(place + 2), 8)
    zeros = bytes + tl.multiple_of(tl.load(place + 3), 16)
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
        there = (n < NP)[:, None]
        if not WHOLE:
            there = there & (k0 < K)
        lo = tl.load(first + at, mask=there, other=0)
        hi = lo
        if BITS == 8:
            hi = tl.load(words + at_second + at, mask=there, other=0)
        elif BITS == 3 or BITS == 6:
            hi = tl.load(bytes + at_second + at, mask=there, other=0).to(tl.int16)
        if Q < S:
            sub = step % (S // Q)
            lo = shifted(lo, sub * (Q * LOW), PTX)
            if BITS == 3 or BITS > 4:
                hi = shifted(hi, sub * (Q * (BITS - LOW)), PTX)
        for r in tl.static_range(Q // RUN):
            k = k0 + r * (RUN * W)
            s_there = n < NP
            if not WHOLE:
                s_there = s_there & (k < K)
            s_at = (k // group) * NP + n
            zero = tl.load(zeros + s_at, mask=s_there, other=0)
            scale = tl.load(scales + s_at, mask=s_there, other=0.0).to(tl.float32).to(DTYPE)
            less = tl.broadcast_to(subtrahend(zero, BITS, DTYPE, PTX)[:, None], [BN, W])
            times = tl.broadcast_to(scale[:, None], [BN, W])
            for j in tl.static_range(RUN):  # slot r * RUN + j of every word
                k = k0 + (r * RUN + j) * W
                if WHOLE:
                    x_tile = tl.load(x + x_at + k, mask=x_ok[None, :], other=0.0)
                else:
                    x_tile = tl.load(x + x_at + k, mask=x_ok[None, :] & (k + w < K)[:, None], other=0.0)
                acc = tl.dot(unpack(lo, hi, less, times, BITS, r * RUN + j, DTYPE, PTX), x_tile, acc)
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
        ok = (at < tl.load(tile_end + t)) & (e >= 0)
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
          PTX: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """FUSED: h[pair] = act(gate x) * (up x). Else parts[p * SPLIT + s, pair], without biases, for `gating`."""
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
           BN: tl.constexpr):  # fmt: skip
    """h[pair] from the parts that `upper` left."""
    pair = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    e = tl.load(ids + pair)
    mine = (n < N) & (e >= 0) & (e < E)
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


@triton.jit(do_not_specialize=["pairs"])
def lower(h, y, table, words, bytes, halves, ids, pairs, sorted_pairs, tile_expert, tile_start, tile_end,
          P: tl.constexpr, E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
          UNIFORM: tl.constexpr, WIDTHS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
          SLOTS: tl.constexpr, SCAN: tl.constexpr, PTX: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """y[s, pair] = down h[pair], over part s of SPLIT of the inputs, without bias."""
    e, pair, ok = members(tl.program_id(1), ids, pairs, sorted_pairs, tile_expert, tile_start, tile_end, E, BM, SCAN)
    if e >= 0:
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        s = tl.program_id(2)
        acc = one(e, P, s, table, words, bytes, halves, n, h, pair.to(tl.int64) * K, ok, E, N, K, W, GROUP, UNIFORM,
                  SPLIT, BN, BM, SLOTS, WIDTHS, PTX, STAGES)  # fmt: skip
        to = s.to(tl.int64) * pairs * N + pair.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(y + to, acc.to(y.dtype.element_ty), mask=ok[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["pairs"])
def weighted_sum(y, weight, bias, ids, out, pairs, CHOICES: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
                 BIAS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """out[t] = sum over the token's choices, in their order, of weight * (y + bias); others' experts are left out."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN], tl.float32)
    for k in tl.static_range(CHOICES):
        e = tl.load(ids + t * CHOICES + k)
        ok = (e >= 0) & (e < E)
        value = tl.zeros([BN], tl.float32)
        for s in tl.static_range(SPLIT):
            at = y + s * pairs.to(tl.int64) * N + (t * CHOICES + k) * N + n
            value += tl.load(at, mask=(n < N) & ok, other=0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + e * N + n, mask=(n < N) & ok, other=0.0).to(tl.float32)
        acc += value * tl.load(weight + t * CHOICES + k, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + t * N + n, acc.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["pairs"])
def routing(ids, pairs, sorted_pairs, tile_expert, tile_start, tile_end, E: tl.constexpr, BM: tl.constexpr,
            CHUNK: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Program e sorts expert e's pairs into place and writes its tiles; ranges of tiles are disjoint by arithmetic.

    With s pairs of lower experts, e's tiles begin at s // BM + e; there are pairs // BM + E in all, some of them empty.
    """
    e = tl.program_id(0)
    lower_count, count, at = 0, 0, 0
    while at < pairs:  # and not `range`, whose bounds may not be tensors in the interpreter
        i = at + tl.arange(0, CHUNK)
        found = tl.load(ids + i, mask=i < pairs, other=-1).to(tl.int32)
        lower_count += tl.sum(((found >= 0) & (found < e)).to(tl.int32), 0)
        count += tl.sum((found == e).to(tl.int32), 0)
        at += CHUNK
    done, at = lower_count, 0
    while at < pairs:
        i = at + tl.arange(0, CHUNK)
        found = tl.load(ids + i, mask=i < pairs, other=-1).to(tl.int32)
        mine = found == e
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(sorted_pairs + done + rank, i, mask=mine)
        done += tl.sum(mine.to(tl.int32), 0)
        at += CHUNK
    first = lower_count // BM + e
    after = (lower_count + count) // BM + e + 1
    if e == E - 1:
        after = pairs // BM + E
    at = first
    while at < after:
        t = at + tl.arange(0, TILES)
        start = lower_count + (t - first) * BM
        used = start < lower_count + count
        tl.store(tile_expert + t, tl.where(used, e, -1), mask=t < after)
        tl.store(tile_start + t, start, mask=t < after)
        tl.store(tile_end + t, lower_count + count, mask=t < after)
        at += TILES
