/* A layer's packed experts on a few tokens, on a CPU. Built at first use by kernels/cpu.py; C of GCC's and Clang's kind,
   POSIX threads.

   A matrix lies in tiles of 16 rows (kernels/tiles.py says how, and what for): a vector holds four codes of each row,
   side by side, so that nothing is summed across lanes and scales and zero points are vectors. Activations become
   integers in three parts of 8 bits (22 together; bfloat16 ones in two, 15 together) with one float scale for each 64 of
   them, so code * activation is exact integer arithmetic; a group's sum is scaled as floats:

     sum_k (code - zero) * scale * x  =  sum_groups scale * (sum code * x  -  zero * sum x)

   Plain C multiplies floats instead. */

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "team.h"
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define X86 1
#define TARGET_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,f16c,fma,avx2")))
#define TARGET_AVX2 __attribute__((target("avx2,f16c,fma")))
#else
#define X86 0
#endif
#define INLINE static inline __attribute__((always_inline)) /* into its callers for one instruction set each */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

enum { TILE = 16, /* rows */
       CHUNK = 32, /* inputs whose codes share words */
       BLOCK = 64, UNIT = 16, STATS = 8, ROWS = 64, MAX_THREADS = 256,
       MOST = 127 * 128 + 63, /* of an activation in two parts */
       APART = 128, /* where half of a block is smaller than its largest by this factor, integers are too coarse */
       AHEAD = 16384 /* bytes that are asked for ahead, into the second cache */ };

/* One matrix [out, in]: ceil(out / TILE) tiles. */
typedef struct {
    const uint8_t *tiles;
    int32_t bits, group, zeros; /* zeros: whether it has zero points; else they are 2^(bits-1) everywhere */
} Matrix;

typedef struct {
    const uint8_t *codes;  /* [stride / CHUNK, bits, TILE] words */
    const uint8_t *scales; /* fp16 [groups, TILE] */
    const uint8_t *zeros;  /* [groups, TILE * bits / 8]; unpacked: [groups, TILE] */
    int middle, group;     /* middle: 2^(bits-1) where there are no zero points */
    int unit;              /* inputs that share a group and a block: BLOCK, CHUNK or UNIT */
    int64_t last;          /* group; what fills up a block after it counts to it */
} Tile;

/* Quantized rows; stride is `in` rounded up to BLOCK. x = scale * ((high * 128 + mid) * 128 + low), or scale * (high *
   128 + low) in two parts; mid and low from -64 to 63. */
typedef struct {
    int8_t *parts;  /* [rows, stride / BLOCK, parts, BLOCK] */
    float *stats;   /* [rows, stride / BLOCK, STATS]: scale; sums of all quantized x, of 2 halves, of 4 quarters */
    uint8_t *apart; /* [rows, stride / BLOCK]  whether a block is 0 in all these, and to be multiplied as floats */
    int64_t stride;
} Activations;

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE int64_t tile_bytes(int bits, int group, int zeros, int64_t in) {
    int64_t groups = (in + group - 1) / group;
    return round_up(in, BLOCK) * bits * TILE / 8 + groups * 2 * TILE + (zeros ? groups * 2 * bits : 0);
}

/* n values (and zeros up to BLOCK) as block `block` of row `row`. */
INLINE void quantize_block(int parts, const float *x, int64_t n, const Activations *a, int64_t row, int64_t block) {
    const int64_t at = row * (a->stride / BLOCK) + block;
    float v[BLOCK], top;
    int32_t q[BLOCK], most = 0;
    for (int k = 0; k < BLOCK; k++) v[k] = k < n ? x[k] : 0;
    memcpy(q, v, sizeof q);
    for (int k = 0; k < BLOCK; k++) most = (q[k] & 0x7FFFFFFF) > most ? q[k] & 0x7FFFFFFF : most;
    memcpy(&top, &most, 4);
    float least = top / APART;
    int32_t fewest, sane = top < 3e38f, small = 0;
    memcpy(&fewest, &least, 4); /* of floats without a sign, the bits are in the same order */
    for (int k = 0; k < BLOCK; k++) small += (q[k] & 0x7FFFFFFF) > 0 && (q[k] & 0x7FFFFFFF) < fewest;
    int apart = sane && small >= BLOCK / 2;
    a->apart[at] = (uint8_t)apart;
    if (apart) memset(v, 0, sizeof v), top = 0;
    float scale = top / (float)(parts == 3 ? MOST * 128 + 63 : MOST), inverse = scale > 0 ? 1 / scale : 0;
    if (!sane || !(inverse < 3e38f)) scale = inverse = 0; /* a block of denormals counts as zeros */
    int8_t *to = a->parts + at * parts * BLOCK;
    for (int k = 0; k < BLOCK; k++) {
        float scaled = sane ? v[k] * inverse : 0;
        q[k] = (int32_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
    }
    for (int k = 0; k < BLOCK; k++) {
        int32_t low = ((q[k] + 64) & 127) - 64, rest = (q[k] - low) >> 7, mid = ((rest + 64) & 127) - 64;
        to[(parts - 1) * BLOCK + k] = (int8_t)low;
        if (parts == 3) to[BLOCK + k] = (int8_t)mid, rest = (rest - mid) >> 7;
        to[k] = (int8_t)rest;
    }
    if (!sane) scale = 0.0f / 0.0f; /* infinite and NaN activations give NaN, as any product would */
    int32_t sums[STATS] = {0};
    for (int k = 0; k < BLOCK; k++) sums[4 + k / UNIT] += q[k];
    sums[2] = sums[4] + sums[5], sums[3] = sums[6] + sums[7], sums[1] = sums[2] + sums[3], sums[0] = 1;
    for (int u = 0; u < STATS; u++) a->stats[at * STATS + u] = scale * (float)sums[u];
}

/* x / (1 + exp(-x)), to float32's rounding; written so that compilers use vectors. */
INLINE float silu(float x) {
    float y = -x > 88 ? 88 : -x < -87 ? -87 : -x;
    float n = y * 1.44269504f + 12582912.0f; /* its low bits are the nearest integer */
    int32_t bits;
    memcpy(&bits, &n, 4);
    n -= 12582912.0f;
    float r = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
               1.6666665459e-1f) * r + 5.0000001201e-1f;
    bits = (int32_t)(((uint32_t)bits << 23) + (127u << 23));
    memcpy(&n, &bits, 4);
    return x / (1 + (p * r * r + r + 1) * n);
}

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 0) {
        float v = (float)mantissa * 5.9604644775390625e-8f; /* 2^-24 */
        return sign ? -v : v;
    }
    bits = sign | (exponent == 31 ? 0x7F800000 | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13);
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* The lower `wide` bits of each field of 2 * `apart`. */
INLINE uint64_t lower(int wide, int apart) {
    return ((1ull << wide) - 1) * (apart == 32 ? 1 : apart == 16 ? 0x100000001 : 0x0001000100010001);
}

/* Halves of 2 * wide bits, brought `apart` from each other, and back. */
INLINE uint64_t parted(uint64_t v, int wide, int apart) {
    uint64_t low = lower(wide, apart);
    return (v & low) | (v & ~low) << (apart - wide);
}

INLINE uint64_t joined(uint64_t v, int wide, int apart) {
    uint64_t low = lower(wide, apart);
    return (v & low) | (v >> (apart - wide) & low << wide);
}

/* `bits` bytes: memcpy of 3 or 5 of them would wait for what it stores on its way. */
INLINE uint64_t read_bytes(int bits, const uint8_t *p) {
    uint64_t whole = 0;
    uint32_t low, high;
    uint16_t first, last;
    if (bits == 8) {
        memcpy(&whole, p, 8);
        return whole;
    }
    if (bits >= 4) {
        memcpy(&low, p, 4), memcpy(&high, p + bits - 4, 4);
        return low | (uint64_t)high << 8 * (bits - 4);
    }
    if (bits == 1) return p[0];
    memcpy(&first, p, 2), memcpy(&last, p + bits - 2, 2);
    return first | (uint64_t)last << 8 * (bits - 2);
}

/* 8 codes of a stream, one in each byte, and back. */
INLINE uint64_t spread(int bits, uint64_t v) {
    return parted(parted(parted(v, 4 * bits, 32), 2 * bits, 16), bits, 8);
}

INLINE uint64_t gather(int bits, uint64_t v) {
    return joined(joined(joined(v, bits, 8), 2 * bits, 16), 4 * bits, 32);
}

/* Of vector i of a chunk, what lies in word j (kernels/tiles.py): n bits of each code from bit `of` on, at bit `at` of
   each byte; n may be 0. */
typedef struct {
    int n, of, at;
    uint32_t mask; /* n bits of each byte */
} Piece;

INLINE Piece piece(int bits, int i, int j) {
    const int each = 8 / bits, whole = each * bits, left = 8 - whole, start = (i - whole) * bits;
    int low = j * left > start ? j * left : start, high = (j + 1) * left < start + bits ? (j + 1) * left : start + bits;
    Piece p = {.n = high > low ? high - low : 0, .of = low - start, .at = whole + low - j * left};
    if (i < whole) p = (Piece){.n = i / each == j ? bits : 0, .of = 0, .at = i % each * bits};
    p.mask = 0x01010101u * ((1u << p.n) - 1);
    return p;
}

typedef void RowsOfTile(int parts, const Tile *, const Activations *, const float *x, int64_t in, const int32_t *rows,
                        int m, float *out, uint8_t *zeros, int64_t groups);

#if X86
#define LANES 16
#define TARGET TARGET_512
#define OF(name) name##_512
#include "cpu_tile.h"
#define LANES 8
#define TARGET TARGET_AVX2
#define OF(name) name##_avx2
#include "cpu_tile.h"
#endif
#define LANES 4
#define TARGET
#define OF(name) name##_plain
#include "cpu_tile.h"

/* 2: AVX-512 with VBMI and VNNI; 1: AVX2; 0: plain C. */
int mopeq_level(void) {
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* Floats of scratch for one product of m activations. */
static int64_t scratch_floats(int64_t stride, int64_t m) { return stride / 4 + TILE * m; }

/* Rows first … last-1 (first a multiple of TILE) of one matrix times m activations `rows` of a: y[to[r] * out + n]. */
INLINE void some_rows(int level, int parts, const Matrix *w, int64_t in, int64_t out, int64_t first, int64_t last,
                      const Activations *a, const float *x, const int32_t *rows, int m, float *y, const int32_t *to,
                      float *scratch) {
    int64_t groups = (in + w->group - 1) / w->group, bytes = tile_bytes(w->bits, w->group, w->zeros, in);
    uint8_t *zeros = (uint8_t *)(scratch + TILE * m);
    for (int64_t n = first; n < last; n += TILE) {
        Tile t = {.codes = w->tiles + n / TILE * bytes, .group = w->group, .middle = w->zeros ? 0 : 1 << (w->bits - 1),
                  .last = groups - 1, .unit = w->group % BLOCK == 0 ? BLOCK : w->group % CHUNK == 0 ? CHUNK : UNIT};
        t.scales = t.codes + a->stride * w->bits * TILE / 8, t.zeros = t.scales + groups * 2 * TILE;
#if X86
        if (level == 2)
            ROWS_512[w->bits](parts, &t, a, x, in, rows, m, scratch, zeros, groups);
        else if (level == 1)
            ROWS_avx2[w->bits](parts, &t, a, x, in, rows, m, scratch, zeros, groups);
        else
#endif
            ROWS_plain[w->bits](parts, &t, a, x, in, rows, m, scratch, zeros, groups);
        for (int r = 0; r < m; r++)
            memcpy(y + to[r] * out + n, scratch + r * TILE, (size_t)(out - n < TILE ? out - n : TILE) * 4);
    }
}

/* ------------------------------------------------------------------------------- one call, shared among threads */

typedef struct {
    int32_t expert, start, count;
} Span;

/* Up to two projections of the same activations, [pairs, out] each. */
typedef struct {
    const Matrix *of[2];
    float *y[2];
    int64_t in, out;
    const float *x; /* [rows, in] */
    Activations a;  /* the same, quantized */
    const int32_t *rows; /* [pairs, by expert]: of x */
} Product;

typedef struct {
    atomic_long next, done;
    long total;
} Stage;

typedef struct {
    int level, parts, fused, nspans; /* fused: down follows, on silu(gate) * up */
    const Span *spans;
    const int32_t *pairs; /* by expert */
    int64_t x_rows;
    Product first, second;
    const int64_t *index; /* for the sum over a token's k choices */
    const float *weight;
    float *out;
    int64_t k, experts;
    Stage quantizing, firsts, seconds, sums;
    int64_t scratch_floats;
} Call;

INLINE int64_t expert_of(const Call *c, int64_t pair) { return c->index ? c->index[pair] : 0; }
INLINE int is_there(const Call *c, int64_t pair) { return expert_of(c, pair) >= 0 && expert_of(c, pair) < c->experts; }

/* The stages are taken apart into pieces, which threads take as they come; a result never depends on who took it. */
INLINE long take(Stage *s) {
    long at = atomic_fetch_add(&s->next, 1);
    return at < s->total ? at : -1;
}

INLINE void finish(Stage *s) {
    while (atomic_load(&s->done) < s->total) sched_yield();
}

INLINE void product(int level, int parts, Call *c, const Product *p, long piece, float *scratch) {
    long of_span = (p->out + ROWS - 1) / ROWS;
    const Span *span = c->spans + piece / of_span;
    int64_t first = piece % of_span * ROWS, last = first + ROWS < p->out ? first + ROWS : p->out;
    const int32_t *to = c->pairs + span->start;
    for (int i = 0; i < 2 && p->of[i]; i++)
        some_rows(level, parts, p->of[i] + span->expert, p->in, p->out, first, last, &p->a, p->x,
                  p->rows + span->start, span->count, p->y[i], to, scratch);
    if (c->fused && p == &c->first)
        for (int r = 0; r < span->count; r++) {
            float *gate = p->y[0] + to[r] * p->out, *up = p->y[1] + to[r] * p->out;
            for (int64_t n = first; n < last; n++) gate[n] = silu(gate[n]) * up[n];
            if (level) quantize_block(parts, gate + first, last - first, &c->second.a, to[r], first / BLOCK);
        }
}

INLINE void work_at(int level, int parts, Call *c, float *scratch) {
    Activations *a = &c->first.a;
    for (long row; (row = take(&c->quantizing)) >= 0; atomic_fetch_add(&c->quantizing.done, 1))
        for (int64_t b = 0; level && b < a->stride / BLOCK; b++)
            quantize_block(parts, c->first.x + row * c->first.in + b * BLOCK, c->first.in - b * BLOCK, a, row, b);
    finish(&c->quantizing);
    for (long at; (at = take(&c->firsts)) >= 0; atomic_fetch_add(&c->firsts.done, 1))
        product(level, parts, c, &c->first, at, scratch);
    if (!c->fused) return;
    finish(&c->firsts);
    for (long at; (at = take(&c->seconds)) >= 0; atomic_fetch_add(&c->seconds.done, 1))
        product(level, parts, c, &c->second, at, scratch);
    finish(&c->seconds);
    for (long t; (t = take(&c->sums)) >= 0;) {
        float *out = c->out + t * c->second.out;
        memset(out, 0, c->second.out * 4);
        for (int64_t pair = t * c->k; pair < (t + 1) * c->k; pair++)
            if (is_there(c, pair))
                for (int64_t n = 0; n < c->second.out; n++)
                    out[n] += c->weight[pair] * c->second.y[0][pair * c->second.out + n];
    }
}

#if X86
TARGET_512 static void work_512(Call *c, float *scratch) { work_at(2, c->parts, c, scratch); }
TARGET_AVX2 static void work_avx2(Call *c, float *scratch) { work_at(1, c->parts, c, scratch); }
#endif

static void work(void *call, float *scratch) {
    Call *c = call;
#if X86
    if (c->level == 2) {
        work_512(c, scratch);
        return;
    }
    if (c->level == 1) {
        work_avx2(c, scratch);
        return;
    }
#endif
    work_at(0, c->parts, c, scratch);
}

typedef struct {
    void (*work)(void *, float *);
    void *of;
    float *scratch;
    int64_t floats; /* of scratch, for each */
    atomic_int next;
} Team;

static void join_in(void *team) {
    Team *t = team;
    t->work(t->of, t->scratch + atomic_fetch_add(&t->next, 1) * t->floats);
}

/* `work` on as many threads, `floats` of scratch for each. */
static void run(void (*work)(void *, float *), void *of, int threads, float *scratch, int64_t floats) {
    Team team = {work, of, scratch, floats, 0};
    if (threads > 1 && parallel)
        parallel(join_in, &team, (unsigned)threads, 0);
    else
        work(of, scratch);
}

/* ------------------------------------------------------------------------------------------- what Python calls */

/* A piece of the caller's room; addresses past its end are never used. */
static void *carve(char **at, int64_t bytes) {
    char *p = (char *)(((intptr_t)*at + 63) & ~(intptr_t)63);
    *at = p + bytes;
    return p;
}

static Activations carve_rows(char **at, int64_t rows, int parts, int64_t in) {
    Activations a = {.stride = round_up(in, BLOCK)};
    int64_t blocks = rows * (a.stride / BLOCK);
    a.parts = carve(at, blocks * parts * BLOCK), a.stats = carve(at, blocks * STATS * 4), a.apart = carve(at, blocks);
    return a;
}

/* The pairs sorted by expert, those of other experts left out; rows: which activation each has. */
static void sort_pairs(Call *c, int64_t pairs, int64_t per, Span *spans, int32_t *sorted, int32_t *rows) {
    int64_t n = 0, start = 0;
    for (int64_t e = 0; e < c->experts; e++) spans[e] = (Span){.expert = (int32_t)e};
    for (int64_t i = 0; i < pairs; i++)
        if (is_there(c, i)) spans[expert_of(c, i)].count++;
    for (int64_t e = 0; e < c->experts; e++) {
        spans[e].start = (int32_t)start, start += spans[e].count;
        spans[e].count = 0;
    }
    for (int64_t i = 0; i < pairs; i++)
        if (is_there(c, i)) {
            Span *s = spans + expert_of(c, i);
            int64_t at = s->start + s->count++;
            sorted[at] = (int32_t)i, rows[at] = (int32_t)(i / per);
        }
    for (int64_t e = 0; e < c->experts; e++)
        if (spans[e].count) spans[n++] = spans[e];
    c->spans = spans, c->nspans = (int)n, c->pairs = sorted;
}

/* y[i] [pairs, out] = x[pair / per] times expert index[pair]'s matrix of `first` (and of `second` [experts], if any);
   rows of experts that are not there stay as they are. No `index` means that there is one expert, which takes all. If
   `down` [experts] is given, then instead
   out [x_rows, in] = sum over pairs of a row of weight * down(silu(y[0]) * y[1]), y in the room.
   0, or how many bytes of room it takes, if there are fewer: nothing is done then. `parts`: 2 or 3, of activations. */
int64_t mopeq_experts(const Matrix *first, const Matrix *second, const Matrix *down, int64_t experts, int64_t in,
                      int64_t out, const float *x, int64_t x_rows, const int64_t *index, int64_t per,
                      const float *weight, float *y0, float *y1, int threads, int level, int parts, char *room,
                      int64_t bytes) {
    int64_t pairs = x_rows * per;
    threads = threads > MAX_THREADS ? MAX_THREADS : threads;
    Call c = {.level = level, .parts = parts, .fused = down != 0, .x_rows = x_rows, .index = index, .weight = weight,
              .k = per, .experts = experts, .out = y0};
    char *at = room;
    Span *spans = carve(&at, experts * sizeof(Span));
    int32_t *sorted = carve(&at, pairs * 4), *rows = carve(&at, pairs * 4);
    c.first = (Product){{first, second}, {y0, y1}, in, out, x, carve_rows(&at, x_rows, parts, in), rows};
    int64_t stride = c.first.a.stride;
    if (down) {
        c.first.y[0] = carve(&at, pairs * out * 4), c.first.y[1] = carve(&at, pairs * out * 4);
        float *y = carve(&at, pairs * in * 4), *h = c.first.y[0];
        c.second = (Product){{down, 0}, {y, 0}, out, in, h, carve_rows(&at, pairs, parts, out), sorted};
        stride = c.second.a.stride > stride ? c.second.a.stride : stride;
    }
    c.scratch_floats = (scratch_floats(stride, pairs) + 15) / 16 * 16;
    float *scratch = carve(&at, threads * c.scratch_floats * 4);
    if (at - room > bytes) return at - room;
    sort_pairs(&c, pairs, per, spans, sorted, rows);
    c.quantizing.total = x_rows, c.sums.total = x_rows;
    c.firsts.total = c.nspans * ((out + ROWS - 1) / ROWS), c.seconds.total = c.nspans * ((in + ROWS - 1) / ROWS);
    run(work, &c, threads, scratch, c.scratch_floats);
    return 0;
}

/* ------------------------------------------------------------------------------- tiles from stored tensors, and back

   `way`: INTO tiles, BACK to the stored tensors of docs/format.md, or OUT of them with a byte for each code and zero
   point, all [out, …] then. */

enum { INTO, BACK, OUT };

/* One row of a tile's codes; its words lie TILE apart. */
INLINE void order_row(int way, int bits, uint8_t *tile, int64_t in, uint8_t *codes) {
    const int64_t wide = way == OUT ? CHUNK : CHUNK / 8 * bits, row_bytes = way == OUT ? in : (in * bits + 7) / 8;
    for (int64_t at = 0; at < row_bytes; at += wide, tile += 4 * TILE * bits) {
        const int64_t n = row_bytes - at < wide ? row_bytes - at : wide;
        uint8_t some[CHUNK];
        uint32_t words[8] = {0}, v[8] = {0};
        if (way == INTO && n < wide) memset(some, 0, sizeof some);
        if (way == INTO) memcpy(some, codes + at, (size_t)(n < wide ? n : wide));
        for (int q = 0; way == INTO && q < 4; q++) {
            uint64_t eight = spread(bits, read_bytes(bits, some + q * bits));
            memcpy(v + 2 * q, &eight, 8);
        }
        for (int j = 0; way != INTO && j < bits; j++) memcpy(words + j, tile + 4 * TILE * j, 4);
        UNROLL
        for (int i = 0; i < 8; i++) {
            UNROLL
            for (int j = 0; j < bits; j++) {
                const Piece p = piece(bits, i, j);
                if (way == INTO)
                    words[j] |= (v[i] >> p.of & p.mask) << p.at;
                else
                    v[i] |= (words[j] >> p.at & p.mask) << p.of;
            }
        }
        for (int j = 0; way == INTO && j < bits; j++) memcpy(tile + 4 * TILE * j, words + j, 4);
        for (int q = 0; way != INTO && q < 4; q++) {
            uint64_t eight;
            memcpy(&eight, v + 2 * q, 8);
            if (way == BACK) eight = gather(bits, eight);
            memcpy(some + q * (way == OUT ? 8 : bits), &eight, way == OUT ? 8 : (size_t)bits);
        }
        if (way != INTO) memcpy(codes + at, some, (size_t)(n < wide ? n : wide));
    }
}

typedef struct {
    int way, bits, group;
    uint8_t *tiles, *codes, *zeros;
    uint16_t *scales;
    int64_t in, out, first, last;
    Stage stage;
} Ordering;

INLINE void order_tile(int way, int bits, const Ordering *o, int64_t number, int64_t first, int64_t last) {
    const int64_t groups = (o->in + o->group - 1) / o->group, zero_bytes = (o->out * bits + 7) / 8;
    const int64_t row_bytes = way == OUT ? o->in : (o->in * bits + 7) / 8, at = number * 2 * bits;
    const int64_t bytes = tile_bytes(bits, o->group, o->zeros != 0, o->in);
    uint8_t *tile = o->tiles + number * bytes, *scales = tile + round_up(o->in, BLOCK) * bits * TILE / 8;
    uint8_t *zeros = scales + 2 * groups * TILE;
    if (way == INTO) memset(tile, 0, (size_t)bytes);
    for (int64_t n = first; n < last; n++) {
        const int64_t row = n % TILE;
        uint16_t *of_row = o->scales + (n - o->first) * groups;
        order_row(way, bits, tile + 4 * row, o->in, o->codes + (n - o->first) * row_bytes);
        for (int64_t g = 0; g < groups; g++) {
            uint8_t *scale = scales + 2 * (g * TILE + row);
            if (way == INTO)
                memcpy(scale, of_row + g, 2);
            else
                memcpy(of_row + g, scale, 2);
            if (!o->zeros || way != OUT) continue;
            uint64_t eight = spread(bits, read_bytes(bits, zeros + (2 * g + row / 8) * bits));
            o->zeros[(n - o->first) * groups + g] = (uint8_t)(eight >> row % 8 * 8);
        }
    }
    const int64_t some = zero_bytes - at < 2 * bits ? zero_bytes - at : 2 * bits;
    for (int64_t g = 0; o->zeros && way != OUT && g < groups; g++) {
        uint8_t *packed = o->zeros + g * zero_bytes + at;
        if (way == INTO)
            memcpy(zeros + 2 * g * bits, packed, (size_t)some);
        else
            memcpy(packed, zeros + 2 * g * bits, (size_t)some);
    }
}

INLINE void order_some(int way, int bits, Ordering *o) {
    for (long at; (at = take(&o->stage)) >= 0;) {
        int64_t tile = o->first / TILE + at, first = tile * TILE, last = first + TILE;
        order_tile(way, bits, o, tile, first < o->first ? o->first : first, last > o->last ? o->last : last);
    }
}

#define ORDER(BITS)                                                                                                   \
    case BITS:                                                                                                        \
        if (o->way == INTO)                                                                                           \
            order_some(INTO, BITS, o);                                                                                \
        else if (o->way == BACK)                                                                                      \
            order_some(BACK, BITS, o);                                                                                \
        else                                                                                                          \
            order_some(OUT, BITS, o);                                                                                 \
        break;

static void order_work(void *ordering, float *scratch) {
    Ordering *o = ordering;
    (void)scratch;
    switch (o->bits) { ORDER(1) ORDER(2) ORDER(3) ORDER(4) ORDER(5) ORDER(6) ORDER(7) ORDER(8) }
}

/* Rows first … last-1 of a matrix [out, in]. codes and scales are of these rows; stored zero points are the whole
   matrix's, so that INTO and BACK take all rows. */
void mopeq_order(int way, uint8_t *tiles, int bits, int group, int64_t in, int64_t out, int64_t first, int64_t last,
                 uint8_t *codes, uint16_t *scales, uint8_t *zeros, int threads) {
    Ordering o = {way, bits, group, tiles, codes, zeros, scales, in, out, first, last, {0}};
    o.stage.total = last > first ? (last + TILE - 1) / TILE - first / TILE : 0;
    run(order_work, &o, threads > MAX_THREADS ? MAX_THREADS : threads, 0, 0);
}
