/* A layer's packed experts on a few tokens, on a CPU. Built at first use by kernels/cpu.py; plain C, POSIX threads.

   A row's codes are one little-endian bit stream (docs/format.md), read as stored: nothing is re-arranged or copied.
   Activations become 22-bit integers with one float scale for each 64 of them (rounded to 2^-22 of the block's
   largest, so results are float32's), so code * activation is exact integer arithmetic and the unpacking ends in byte
   or word dot products:

     AVX-512 (VBMI, VNNI)  128 codes of up to 4 bits: one byte permute, one multishift, one shift, two masks, six dot
                           products; twice the unpacking above
     AVX2                  128 codes of 4 bits: two loads, two shifts, four masks, twelve multiply-adds; at 3 bits four
                           byte shuffles, multiplications as variable shifts and two packs more; above 5 bits by halves
     plain C               whatever the compiler makes of it

   sum_k (code - zero) * scale * x  =  sum_groups scale * (sum code * x  -  zero * sum x). */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define X86 1
#define TARGET_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,f16c,fma,avx2")))
#define TARGET_AVX2 __attribute__((target("avx2,f16c,fma")))
#else
#define X86 0
#endif
#define INLINE static inline __attribute__((always_inline)) /* into its callers for one instruction set each */

enum { MOST = 127 * 128 * 128, /* of a quantized activation: eight times a code of 7 bits fits 31 bits */
       BLOCK = 64, STEP = 128, UNIT = 16, ROWS = 64, MAX_THREADS = 256,
       APART = 128, /* where half of a block is smaller than its largest by this factor, 22 bits are too few */
       NEAR = 512, FAR = 8192 /* bytes of codes that are asked for ahead, into the first and the second cache */ };

/* One matrix [out, in] as it is stored. */
typedef struct {
    const uint8_t *codes;   /* [out, row_bytes] */
    const uint16_t *scales; /* fp16 [out, groups] */
    const uint8_t *zeros;   /* [groups, ceil(out * bits / 8)], or NULL: 2^(bits-1) everywhere */
    int32_t bits, group;
} Matrix;

/* Quantized rows; stride is `in` rounded up to STEP. x = scale * ((high * 128 + mid) * 128 + low), mid and low from -64
   to 63. */
typedef struct {
    int8_t *parts;     /* [rows, 3 * stride]; for each step, high, mid, low as `place` has it; plain C:
                          the words high * 128 + mid as int16, then low */
    float *scale;      /* [rows, stride / BLOCK] */
    float *block_sums; /* [rows, stride / BLOCK]  sums of the quantized x */
    float *unit_sums;  /* [rows, stride / UNIT] */
    uint8_t *apart;    /* [rows, stride / BLOCK]  whether a block is 0 in all these, for `apart` to add */
    int64_t stride;
} Activations;

/* Where a step's two blocks lie: of each 8 values those at even places in one vector, those at odd places in a second,
   since a shifted byte of codes of up to 4 bits holds two neighbours. AVX-512 wants the blocks in turn, 4 bytes each,
   so that two scales broadcast as one 64-bit word meet their own; AVX2 a block in each half of a vector, 32 values in
   two vectors. */
INLINE void place(int level, const int8_t *from, int8_t *to, int64_t second_block) {
    for (int q = 0; q < 8; q++)
        for (int odd = 0; odd < 2; odd++) {
            uint64_t v;
            memcpy(&v, from + 8 * q, 8);
            v = v >> 8 * odd & 0x00FF00FF00FF00FF;
            v = (v | v >> 8) & 0x0000FFFF0000FFFF;
            uint32_t four = (uint32_t)(v | v >> 16);
            int64_t at = level == 2 ? 64 * odd + 8 * q + 4 * second_block
                                    : 64 * (q / 4) + 32 * odd + 16 * second_block + 4 * (q % 4);
            memcpy(to + at, &four, 4);
        }
}

/* n values (and zeros up to BLOCK) as block `block` of row `row`. */
INLINE void quantize_block(int level, const float *x, int64_t n, const Activations *a, int64_t row, int64_t block) {
    float v[BLOCK], top;
    int32_t q[BLOCK], most = 0, sums[BLOCK / UNIT];
    int8_t high[BLOCK], mid[BLOCK], low[BLOCK];
    int16_t words[BLOCK];
    for (int k = 0; k < BLOCK; k++) v[k] = k < n ? x[k] : 0;
    memcpy(q, v, sizeof q);
    for (int k = 0; k < BLOCK; k++) most = (q[k] & 0x7FFFFFFF) > most ? q[k] & 0x7FFFFFFF : most;
    memcpy(&top, &most, 4);
    float least = top / APART;
    int32_t fewest, sane = top < 3e38f, small = 0;
    memcpy(&fewest, &least, 4); /* of floats without a sign, the bits are in the same order */
    for (int k = 0; k < BLOCK; k++) small += (q[k] & 0x7FFFFFFF) > 0 && (q[k] & 0x7FFFFFFF) < fewest;
    int apart = sane && small >= BLOCK / 2;
    a->apart[row * (a->stride / BLOCK) + block] = (uint8_t)apart;
    if (apart) memset(v, 0, sizeof v), top = 0;
    float scale = top / MOST, inverse = scale > 0 ? 1 / scale : 0;
    if (!sane || !(inverse < 3e38f)) scale = inverse = 0; /* a block of denormals counts as zeros */
    for (int k = 0; k < BLOCK; k++) {
        float scaled = sane ? v[k] * inverse : 0;
        q[k] = (int32_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
        int32_t lo = ((q[k] + 64) & 127) - 64, word = (q[k] - lo) >> 7, middle = ((word + 64) & 127) - 64;
        words[k] = (int16_t)word, low[k] = (int8_t)lo, mid[k] = (int8_t)middle;
        high[k] = (int8_t)((word - middle) >> 7);
    }
    if (!sane) scale = 0.0f / 0.0f; /* infinite and NaN activations give NaN, as any product would */
    int8_t *to = a->parts + row * 3 * a->stride;
    if (level) {
        to += block / 2 * 3 * STEP;
        place(level, high, to, block % 2), place(level, mid, to + STEP, block % 2);
        place(level, low, to + 2 * STEP, block % 2);
    } else {
        memcpy(to + 2 * block * BLOCK, words, sizeof words);
        memcpy(to + 2 * a->stride + block * BLOCK, low, sizeof low);
    }
    int32_t sum = 0;
    for (int u = 0; u < BLOCK / UNIT; u++) {
        sums[u] = 0;
        for (int k = 0; k < UNIT; k++) sums[u] += q[u * UNIT + k];
        a->unit_sums[row * (a->stride / UNIT) + block * (BLOCK / UNIT) + u] = scale * (float)sums[u];
        sum += sums[u];
    }
    a->scale[row * (a->stride / BLOCK) + block] = scale;
    a->block_sums[row * (a->stride / BLOCK) + block] = scale * (float)sum;
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

/* What of `bytes` after p may be read as one 64-bit word: short reads are filled with zeros. */
INLINE uint64_t read_bytes(const uint8_t *p, int64_t bytes) {
    uint64_t v = 0;
    if (bytes >= 8)
        memcpy(&v, p, 8);
    else
        memcpy(&v, p, bytes < 0 ? 0 : bytes);
    return v;
}

/* ------------------------------------------------------------- one row of codes, times m activations

   `out` [m] = the sum of `start` [m, 16], and of scales * (code . x). `scales` [m, n]: the weights' scale times the
   activations', for each block if `uniform`, else for each unit. `rows` says which activations. */

static void dot_plain(const uint8_t *codes, int64_t row_bytes, int bits, const float *scales, const float *start,
                      const Activations *a, const int32_t *rows, int m, float *out, int uniform) {
    int mask = (1 << bits) - 1;
    int64_t steps = a->stride / (uniform ? BLOCK : UNIT);
    for (int r = 0; r < m; r++) {
        float sum = 0; /* of 16 in a register: out[r] may be anywhere, so that each step would wait for memory */
        for (int k = 0; k < 16; k++) sum += start[16 * r + k];
        out[r] = sum;
    }
    for (int64_t at = 0; at < a->stride; at += UNIT) {
        int16_t c[UNIT];
        for (int half = 0; half < 2; half++) {
            int64_t byte = (at + 8 * half) * bits / 8;
            uint64_t v = read_bytes(codes + byte, row_bytes - byte);
            for (int j = 0; j < 8; j++) c[8 * half + j] = (int16_t)((v >> (j * bits)) & mask);
        }
        for (int r = 0; r < m; r++) {
            const int16_t *x = (const int16_t *)(a->parts + rows[r] * 3 * a->stride) + at;
            const int8_t *low = a->parts + (rows[r] * 3 + 2) * a->stride + at;
            int32_t sum = 0, rest = 0;
            for (int k = 0; k < UNIT; k++) sum += (int32_t)c[k] * x[k], rest += (int32_t)c[k] * low[k];
            out[r] += ((float)sum * 128 + (float)rest) * scales[r * steps + (uniform ? at / BLOCK : at / UNIT)];
        }
    }
}

#if X86
/* By width, which two bytes of 16 hold each wanted bit field, and the factor that brings its first bit to bit 8: up to
   4 bits, pairs of codes, of the first 16 and of the next; above, even codes and odd ones. */
static uint8_t fields[9][2][32];
static int16_t raise[9][2][16];

__attribute__((constructor)) static void make_tables_avx2(void) {
    for (int bits = 1; bits <= 8; bits++)
        for (int which = 0; which < 2; which++)
            for (int i = 0; i < 16; i++) {
                int bit = bits <= 4 ? 2 * bits * (i % 8 + 8 * which) : bits * (2 * (i % 8) + which);
                uint8_t *pair = fields[bits][which] + 2 * i;
                pair[0] = (uint8_t)(bit / 8), pair[1] = (uint8_t)(bit / 8 + 1);
                raise[bits][which][i] = (int16_t)(1 << (8 - bit % 8));
            }
}

INLINE TARGET_AVX2 __m256i two_lanes(const uint8_t *p, const uint8_t *q) {
    __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i *)q), 1);
}

/* The wanted fields of 16 bytes in 16 bits each, and whatever follows them up to the eighth bit. */
INLINE TARGET_AVX2 __m256i field(int bits, int which, __m256i v) {
    v = _mm256_shuffle_epi8(v, _mm256_loadu_si256((const __m256i *)fields[bits][which]));
    v = _mm256_mullo_epi16(v, _mm256_loadu_si256((const __m256i *)raise[bits][which]));
    return _mm256_srli_epi16(v, 8);
}

/* Even and odd codes of 32 at p, beside those of 32 a block later. */
INLINE TARGET_AVX2 void unpack_avx2(int bits, const uint8_t *p, __m256i *even, __m256i *odd) {
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1)), bytes = _mm256_set1_epi16(255);
    const uint8_t *q = p + 8 * bits;
    __m256i v = two_lanes(p, q), w;
    if (bits <= 4) {
        if (bits == 2)
            v = _mm256_unpacklo_epi8(v, _mm256_srli_epi16(v, 4));
        else if (bits != 4)
            v = _mm256_packus_epi16(field(bits, 0, v), field(bits, 1, v));
        *even = _mm256_and_si256(v, mask), *odd = _mm256_and_si256(_mm256_srli_epi16(v, bits), mask);
        return;
    }
    w = two_lanes(p + 2 * bits, q + 2 * bits);
    if (bits == 8) {
        *even = _mm256_packus_epi16(_mm256_and_si256(v, bytes), _mm256_and_si256(w, bytes));
        *odd = _mm256_packus_epi16(_mm256_srli_epi16(v, 8), _mm256_srli_epi16(w, 8));
        return;
    }
    *even = _mm256_and_si256(_mm256_packus_epi16(field(bits, 0, v), field(bits, 0, w)), mask);
    *odd = _mm256_and_si256(_mm256_packus_epi16(field(bits, 1, v), field(bits, 1, w)), mask);
}

/* 32 sums of a few codes times the three parts of as many x: `n` vectors of each, from the part's vector `first` on. */
INLINE TARGET_AVX2 __m256i dot_parts(const __m256i *v, const int8_t *x, int first, int n) {
    __m256i dot = _mm256_setzero_si256();
    for (int part = 0; part < 3; part++) {
        const __m256i *of = (const __m256i *)(x + part * STEP) + first;
        __m256i sum = _mm256_maddubs_epi16(v[first], _mm256_loadu_si256(of));
        for (int k = 1; k < n; k++)
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(v[first + k], _mm256_loadu_si256(of + k)));
        dot = _mm256_add_epi32(dot, _mm256_madd_epi16(sum, _mm256_set1_epi16((int16_t)(1 << (14 - 7 * part)))));
    }
    return dot;
}

/* One step of a row of codes at p times `ms` activations: see dot_avx2. Codes of up to 5 bits fit: four products of two
   bytes in 16 bits, sixteen of a code and an x in 32. Wider ones go by their lower four bits and the others. */
INLINE TARGET_AVX2 void step_avx2(int bits, int ms, const uint8_t *p, int64_t s, const int8_t *const *x,
                                  const float *scales, int64_t per_row, int uniform, __m256 *sum) {
    const __m256i of_block = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), four = _mm256_set1_epi8(15);
    const __m256i of_unit[2] = {_mm256_setr_epi32(0, 0, 1, 1, 4, 4, 5, 5), _mm256_setr_epi32(2, 2, 3, 3, 6, 6, 7, 7)};
    __m256i v[2][4];
    unpack_avx2(bits, p, &v[0][0], &v[0][1]), unpack_avx2(bits, p + 4 * bits, &v[0][2], &v[0][3]);
    for (int k = 0; k < 4 && bits > 5; k++) {
        v[1][k] = _mm256_and_si256(_mm256_srli_epi16(v[0][k], 4), four);
        v[0][k] = _mm256_and_si256(v[0][k], four);
    }
    for (int r = 0; r < ms; r++) {
        const int8_t *of = x[r] + s * 3 * STEP;
        const float *scale = scales + r * per_row + s * (uniform ? 2 : 8);
        __m256 by[2];
        if (uniform)
            by[0] = _mm256_permutevar8x32_ps(
                _mm256_castpd_ps(_mm256_castpd128_pd256(_mm_load_sd((const double *)scale))), of_block);
        else
            for (int half = 0; half < 2; half++)
                by[half] = _mm256_permutevar8x32_ps(_mm256_loadu_ps(scale), of_unit[half]);
        for (int upper = 0; upper < (bits > 5 ? 2 : 1); upper++)
            for (int half = 0; half < (uniform ? 1 : 2); half++) {
                __m256i dot = dot_parts(v[upper], of, 2 * half, uniform ? 4 : 2);
                __m256 b = upper ? _mm256_mul_ps(by[half], _mm256_set1_ps(16)) : by[half];
                sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), b, sum[r]);
            }
    }
}

INLINE TARGET_AVX2 void dot_avx2(int bits, int ms, const uint8_t *codes, int64_t row_bytes, const float *scales,
                                 const float *start, const Activations *a, const int32_t *rows, float *out,
                                 int uniform) {
    const int64_t steps = a->stride / STEP, per_row = steps * (uniform ? 2 : 8);
    const int reads = (bits > 4 ? 14 : 12) * bits + 16; /* of a step */
    int64_t s = 0, inside = row_bytes < reads ? 0 : (row_bytes - reads) / (16 * bits) + 1;
    const int8_t *x[4];
    __m256 sum[4];
    for (int r = 0; r < ms; r++) {
        x[r] = a->parts + rows[r] * 3 * a->stride;
        sum[r] = _mm256_add_ps(_mm256_loadu_ps(start + 16 * r), _mm256_loadu_ps(start + 16 * r + 8));
    }
    for (; s < inside; s++) {
        const uint8_t *p = codes + s * 16 * bits;
        _mm_prefetch((const char *)(p + NEAR), _MM_HINT_T0), _mm_prefetch((const char *)(p + FAR), _MM_HINT_T1);
        if (bits > 4) _mm_prefetch((const char *)(p + FAR + 64), _MM_HINT_T1);
        step_avx2(bits, ms, p, s, x, scales, per_row, uniform, sum);
    }
    for (; s < steps; s++) {
        uint8_t rest[16 * 8 + 16] = {0};
        int64_t left = row_bytes - s * 16 * bits;
        memcpy(rest, codes + s * 16 * bits, left < 0 ? 0 : left < 16 * bits ? left : 16 * bits);
        step_avx2(bits, ms, rest, s, x, scales, per_row, uniform, sum);
    }
    for (int r = 0; r < ms; r++) {
        __m128 h = _mm_add_ps(_mm256_castps256_ps128(sum[r]), _mm256_extractf128_ps(sum[r], 1));
        h = _mm_add_ps(h, _mm_movehl_ps(h, h));
        out[r] = _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
    }
}

#define DOTS_OF_256(BITS)                                                                                             \
    TARGET_AVX2 static void dot_avx2_##BITS(int ms, const uint8_t *codes, int64_t row_bytes, const float *scales,     \
                                            const float *start, const Activations *a, const int32_t *rows,            \
                                            float *out, int uniform) {                                                \
        if (uniform && ms == 1)                                                                                       \
            dot_avx2(BITS, 1, codes, row_bytes, scales, start, a, rows, out, 1);                                      \
        else if (ms == 4)                                                                                             \
            dot_avx2(BITS, 4, codes, row_bytes, scales, start, a, rows, out, uniform);                                \
        else if (ms == 2)                                                                                             \
            dot_avx2(BITS, 2, codes, row_bytes, scales, start, a, rows, out, uniform);                                \
        else                                                                                                          \
            dot_avx2(BITS, 1, codes, row_bytes, scales, start, a, rows, out, uniform);                                \
    }
DOTS_OF_256(1) DOTS_OF_256(2) DOTS_OF_256(3) DOTS_OF_256(4) DOTS_OF_256(5) DOTS_OF_256(6) DOTS_OF_256(7) DOTS_OF_256(8)
typedef void DotAvx2(int, const uint8_t *, int64_t, const float *, const float *, const Activations *, const int32_t *,
                     float *, int);
static DotAvx2 *const DOTS_AVX2[9] = {0, dot_avx2_1, dot_avx2_2, dot_avx2_3, dot_avx2_4,
                                      dot_avx2_5, dot_avx2_6, dot_avx2_7, dot_avx2_8};

/* Constants by width: which bytes a permute brings together and at which bit of its 64-bit word each wanted byte then
   begins, for a step, and for 64 codes in their own order; the places of even and odd codes of two vectors; an 8 x 8
   matrix of bytes transposed. */
static uint8_t spread[9][64], shifts[9][64], eights[9][64], in_bits[9][64], places[2][64], transposed[64];

__attribute__((constructor)) static void make_tables(void) {
    for (int i = 0; i < 64; i++) {
        int q = i / 8, block = i / 4 % 2, j = i % 4, byte = i % 8;
        for (int bits = 1; bits <= 8; bits++) {
            eights[bits][i] = (uint8_t)(q * bits + (byte < bits ? byte : 0)), in_bits[bits][i] = (uint8_t)(byte * bits);
            if (bits > 4) { /* a word of 8 codes */
                spread[bits][i] = eights[bits][i], shifts[bits][i] = in_bits[bits][i];
            } else { /* a word of 8 codes of each block; each byte wanted is two codes */
                spread[bits][i] = (uint8_t)(block * 8 * bits + q * bits + (j < bits ? j : 0));
                shifts[bits][i] = (uint8_t)(32 * block + j * 2 * bits);
            }
        }
        for (int odd = 0; odd < 2; odd++) places[odd][i] = (uint8_t)(block * 64 + 8 * q + 2 * j + odd);
        transposed[i] = (uint8_t)(i % 8 * 8 + i / 8);
    }
}

/* 64 bytes from p, or as many of them as lie before `end`; of `most` at most. */
INLINE TARGET_512 __m512i load_512(const uint8_t *p, const uint8_t *end, int most, int inside) {
    if (inside) {
        if (most <= 16) return _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
        if (most <= 32) return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p));
        return _mm512_loadu_si512(p);
    }
    int64_t there = end - p < 0 ? 0 : end - p < most ? end - p : most;
    return _mm512_maskz_loadu_epi8(there == 64 ? ~0ull : (1ull << there) - 1, p);
}

/* One step of `nr` rows of codes times `ms` activations: see dot_512. */
INLINE TARGET_512 void step_512(int bits, int nr, int ms, int inside, const uint8_t *codes, int64_t row_bytes,
                                int64_t s, const int8_t *const *x, const float *scales, int64_t per_row, int uniform,
                                __m512 *sum) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    const __m512i bytes = _mm512_loadu_si512(spread[bits]), shift = _mm512_loadu_si512(shifts[bits]);
    const __m512i even = _mm512_loadu_si512(places[0]), odd = _mm512_loadu_si512(places[1]);
    const __m512i lanes = _mm512_setr_epi32(0, 4, 0, 4, 1, 5, 1, 5, 2, 6, 2, 6, 3, 7, 3, 7);
    const int most = bits > 4 ? 8 * bits : 16 * bits;
    for (int i = 0; i < nr; i++) {
        const uint8_t *p = codes + i * row_bytes + s * 16 * bits, *end = codes + (i + 1) * row_bytes;
        _mm_prefetch((const char *)(p + NEAR), _MM_HINT_T0), _mm_prefetch((const char *)(p + FAR), _MM_HINT_T1);
        if (bits > 4) _mm_prefetch((const char *)(p + FAR + 64), _MM_HINT_T1);
        __m512i v = _mm512_permutexvar_epi8(bytes, load_512(p, end, most, inside)), first, second;
        if (bits != 4) v = _mm512_multishift_epi64_epi8(shift, v);
        if (bits <= 4) {
            first = _mm512_and_si512(v, mask);
            second = _mm512_and_si512(_mm512_srli_epi16(v, bits), mask);
        } else {
            __m512i w = _mm512_permutexvar_epi8(bytes, load_512(p + 8 * bits, end, most, inside));
            v = _mm512_and_si512(v, mask), w = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, w), mask);
            first = _mm512_permutex2var_epi8(v, even, w), second = _mm512_permutex2var_epi8(v, odd, w);
        }
        for (int r = 0; r < ms; r++) {
            const int8_t *of = x[r] + s * 3 * STEP;
            const float *scale = scales + (i * ms + r) * per_row + s * (uniform ? 2 : 8);
            __m512 by = uniform ? _mm512_castpd_ps(_mm512_set1_pd(*(const double *)scale))
                                : _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(_mm256_loadu_ps(scale)));
            __m512i dot = _mm512_setzero_si512(), rest = dot;
            for (int part = 0; part < 3; part++) {
                if (part) dot = _mm512_slli_epi32(dot, 7);
                dot = _mm512_dpbusd_epi32(dot, first, _mm512_loadu_si512(of + part * STEP));
                __m512i low = _mm512_loadu_si512(of + part * STEP + 64);
                if (bits < 8)
                    dot = _mm512_dpbusd_epi32(dot, second, low);
                else /* eight products of 8 bits would not fit */
                    rest = _mm512_dpbusd_epi32(_mm512_slli_epi32(rest, 7), second, low);
            }
            sum[i * ms + r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), by, sum[i * ms + r]);
            if (bits == 8) sum[i * ms + r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(rest), by, sum[i * ms + r]);
        }
    }
}

/* `nr` rows of codes times `ms` activations. `scales` [nr, ms, n]; `start` [nr, ms, 16] is what the sums begin with. */
INLINE TARGET_512 void dot_512(int bits, int nr, int ms, const uint8_t *codes, int64_t row_bytes, const float *scales,
                               const float *start, const Activations *a, const int32_t *rows, float *out, int uniform) {
    const int64_t steps = a->stride / STEP, per_row = steps * (uniform ? 2 : 8);
    const int reads = bits > 4 ? 64 + 8 * bits : bits == 3 ? 64 : 16 * bits; /* of a step that reads whole words */
    int64_t s = 0, inside = row_bytes < reads ? 0 : (row_bytes - reads) / (16 * bits) + 1;
    const int8_t *x[4];
    __m512 sum[4];
    for (int r = 0; r < ms; r++) x[r] = a->parts + rows[r] * 3 * a->stride;
    for (int i = 0; i < nr * ms; i++) sum[i] = _mm512_loadu_ps(start + 16 * i);
    for (; s < inside; s++) step_512(bits, nr, ms, 1, codes, row_bytes, s, x, scales, per_row, uniform, sum);
    for (; s < steps; s++) step_512(bits, nr, ms, 0, codes, row_bytes, s, x, scales, per_row, uniform, sum);
    for (int i = 0; i < nr * ms; i++) out[i] = _mm512_reduce_add_ps(sum[i]);
}

#define DOTS(BITS)                                                                                                    \
    TARGET_512 static void dot_512_##BITS(int nr, int ms, const uint8_t *codes, int64_t row_bytes,                    \
                                          const float *scales, const float *start, const Activations *a,             \
                                          const int32_t *rows, float *out, int uniform) {                             \
        if (nr == 2)                                                                                                  \
            dot_512(BITS, 2, 1, codes, row_bytes, scales, start, a, rows, out, 1);                                    \
        else if (ms == 4)                                                                                             \
            dot_512(BITS, 1, 4, codes, row_bytes, scales, start, a, rows, out, uniform);                              \
        else if (ms == 2)                                                                                             \
            dot_512(BITS, 1, 2, codes, row_bytes, scales, start, a, rows, out, uniform);                              \
        else                                                                                                          \
            dot_512(BITS, 1, 1, codes, row_bytes, scales, start, a, rows, out, uniform);                              \
    }
DOTS(1) DOTS(2) DOTS(3) DOTS(4) DOTS(5) DOTS(6) DOTS(7) DOTS(8)
typedef void Dot512(int, int, const uint8_t *, int64_t, const float *, const float *, const Activations *,
                    const int32_t *, float *, int);
static Dot512 *const DOTS_512[9] = {0, dot_512_1, dot_512_2, dot_512_3, dot_512_4,
                                    dot_512_5, dot_512_6, dot_512_7, dot_512_8};

/* Scales of `taken` rows for m activations: to [.., steps] = scales * x's, and start = -sum scales * zeros * x, in 16
   lanes. A group is `per` steps; lane k of `of_step` [per, 16] says which of 16 groups step k of 16 * per is in. */
INLINE TARGET_512 void prepare_some(const uint16_t *scales, const uint8_t *zeros, int middle, int taken, int m,
                                    const Activations *a, const int32_t *rows, const float *sums, int64_t groups,
                                    int64_t per, int uniform, const int32_t *of_step, float *to, float *start) {
    const __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    int64_t blocks = a->stride / BLOCK, steps = uniform ? blocks : a->stride / UNIT;
    for (int i = 0; i < taken; i++, scales += groups, zeros += 16)
        for (int r = 0; r < m; r++, to += steps, start += 16) {
            const float *x_scale = a->scale + rows[r] * blocks, *sum = sums + r * groups;
            __m512 less = _mm512_setzero_ps();
            for (int64_t g = 0; g * per < steps; g += 16) {
                int64_t left = groups - g; /* masked loads and stores are slow on some machines */
                __mmask16 there = left >= 16 ? 0xFFFF : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
                __m256i half = left < 16 ? _mm256_maskz_loadu_epi16(there, scales + g)
                                         : _mm256_loadu_si256((const __m256i *)(scales + g));
                __m512 x = left < 16 ? _mm512_maskz_loadu_ps(there, sum + g) : _mm512_loadu_ps(sum + g);
                __m512i z = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(zeros + g * 8)));
                __m512 zero = middle ? _mm512_set1_ps((float)middle) : _mm512_cvtepi32_ps(z), s = _mm512_cvtph_ps(half);
                less = _mm512_fnmadd_ps(_mm512_mul_ps(s, zero), x, less);
                for (int64_t j = 0, u = g * per; j < per && u < steps; j++, u += 16) {
                    __m512 by = uniform ? _mm512_loadu_ps(x_scale + u)
                                        : _mm512_permutexvar_ps(quarter, _mm512_castps128_ps512(
                                                                             _mm_loadu_ps(x_scale + u / 4)));
                    if (per > 1)
                        by = _mm512_mul_ps(by, _mm512_permutexvar_ps(_mm512_loadu_si512(of_step + 16 * j), s));
                    else
                        by = _mm512_mul_ps(by, s);
                    if (steps - u < 16)
                        _mm512_mask_storeu_ps(to + u, (__mmask16)((1u << (steps - u)) - 1), by);
                    else
                        _mm512_storeu_ps(to + u, by);
                }
            }
            _mm512_storeu_ps(start, less);
        }
}

TARGET_512 static void prepare_512(const uint16_t *scales, const uint8_t *zeros, int middle, int taken, int m,
                                   const Activations *a, const int32_t *rows, const float *sums, int64_t groups,
                                   int64_t per, int uniform, const int32_t *of_step, float *to, float *start) {
    if (uniform && per == 1) /* the usual case, compiled apart */
        prepare_some(scales, zeros, middle, taken, m, a, rows, sums, groups, 1, 1, of_step, to, start);
    else
        prepare_some(scales, zeros, middle, taken, m, a, rows, sums, groups, per, uniform, of_step, to, start);
}

/* prepare_512 in 8 lanes; what is written past a row's steps is written over by the next row, or lies in the room. */
INLINE TARGET_AVX2 void prepare_some_avx2(const uint16_t *scales, const uint8_t *zeros, int middle, int taken, int m,
                                          const Activations *a, const int32_t *rows, const float *sums, int64_t groups,
                                          int64_t per, int uniform, const int32_t *of_step, float *to, float *start) {
    const __m256i quarter = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int64_t blocks = a->stride / BLOCK, steps = uniform ? blocks : a->stride / UNIT;
    for (int i = 0; i < taken; i++, scales += groups, zeros += 16)
        for (int r = 0; r < m; r++, to += steps, start += 16) {
            const float *x_scale = a->scale + rows[r] * blocks, *sum = sums + r * groups;
            __m256 less = _mm256_setzero_ps();
            for (int64_t g = 0; g * per < steps; g += 8) {
                int64_t left = groups - g;
                uint16_t few[8] = {0};
                if (left < 8) memcpy(few, scales + g, left < 0 ? 0 : 2 * left);
                __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(left < 8 ? few : scales + g)));
                __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(left < 0 ? 0 : left > 8 ? 8 : (int)left), lanes);
                __m256 x = left < 8 ? _mm256_maskload_ps(sum + g, there) : _mm256_loadu_ps(sum + g);
                __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(zeros + g / 16 * 128 + g % 16)));
                __m256 zero = middle ? _mm256_set1_ps((float)middle) : _mm256_cvtepi32_ps(z);
                less = _mm256_fnmadd_ps(_mm256_mul_ps(s, zero), x, less);
                for (int64_t j = 0, u = g * per; j < per && u < steps; j++, u += 8) {
                    __m256 by = uniform ? _mm256_loadu_ps(x_scale + u)
                                        : _mm256_permutevar8x32_ps(
                                              _mm256_castps128_ps256(_mm_loadu_ps(x_scale + u / 4)), quarter);
                    if (per > 1)
                        by = _mm256_mul_ps(by, _mm256_permutevar8x32_ps(
                                                   s, _mm256_loadu_si256((const __m256i *)(of_step + 8 * j))));
                    else
                        by = _mm256_mul_ps(by, s);
                    _mm256_storeu_ps(to + u, by);
                }
            }
            _mm256_storeu_ps(start, less), _mm256_storeu_ps(start + 8, _mm256_setzero_ps());
        }
}

TARGET_AVX2 static void prepare_avx2(const uint16_t *scales, const uint8_t *zeros, int middle, int taken, int m,
                                     const Activations *a, const int32_t *rows, const float *sums, int64_t groups,
                                     int64_t per, int uniform, const int32_t *of_step, float *to, float *start) {
    if (uniform && per == 1) /* the usual case, compiled apart */
        prepare_some_avx2(scales, zeros, middle, taken, m, a, rows, sums, groups, 1, 1, of_step, to, start);
    else
        prepare_some_avx2(scales, zeros, middle, taken, m, a, rows, sums, groups, per, uniform, of_step, to, start);
}

/* Fields of `wide` bits, `apart` bits from each other, cut in halves: the upper ones move half way to the next. */
INLINE TARGET_AVX2 __m256i halved(__m256i v, int wide, int apart) {
    uint64_t low = (1ull << wide / 2) - 1;
    for (int at = apart; at < 64; at *= 2) low |= low << at;
    __m256i mask = _mm256_set1_epi64x((long long)low), up = _mm256_sll_epi64(v, _mm_cvtsi32_si128((apart - wide) / 2));
    return _mm256_or_si256(_mm256_and_si256(v, mask), _mm256_andnot_si256(mask, up));
}

/* eight_zeros for AVX2: 8 groups' codes spread over bytes, and those transposed. */
TARGET_AVX2 static void zeros_avx2(const uint8_t *p, int64_t stride, int64_t left, int bits, int64_t groups,
                                   uint8_t *zeros) {
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    for (int64_t g = 0; g < groups; g += 8) {
        long long words[8];
        for (int i = 0; i < 8; i++, p += stride, left -= stride) words[i] = (long long)read_bytes(p, left);
        __m256i v[2];
        for (int odd = 0; odd < 2; odd++) {
            v[odd] = _mm256_setr_epi64x(words[odd], words[2 + odd], words[4 + odd], words[6 + odd]);
            v[odd] = halved(halved(halved(v[odd], 8 * bits, 64), 4 * bits, 32), 2 * bits, 16);
            v[odd] = _mm256_and_si256(v[odd], mask);
        }
        __m256i low = _mm256_unpacklo_epi8(v[0], v[1]), high = _mm256_unpackhi_epi8(v[0], v[1]);
        __m256i rows[2] = {_mm256_unpacklo_epi16(low, high), _mm256_unpackhi_epi16(low, high)};
        uint8_t *to = zeros + g / 16 * 128 + g % 16;
        for (int i = 0; i < 2; i++, to += 64) { /* four rows of four groups, and of the next four */
            __m128i a = _mm256_castsi256_si128(rows[i]), b = _mm256_extracti128_si256(rows[i], 1);
            __m128i c = _mm_unpacklo_epi32(a, b), d = _mm_unpackhi_epi32(a, b);
            _mm_storel_epi64((__m128i *)to, c), _mm_storeh_pd((double *)(to + 16), _mm_castsi128_pd(c));
            _mm_storel_epi64((__m128i *)(to + 32), d), _mm_storeh_pd((double *)(to + 48), _mm_castsi128_pd(d));
        }
    }
}

/* eight_zeros for AVX-512. */
TARGET_512 static void zeros_512(const uint8_t *p, int64_t stride, int64_t left, int bits, int64_t groups,
                                 uint8_t *zeros) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1)), order = _mm512_loadu_si512(transposed);
    const __m512i shift = _mm512_loadu_si512(in_bits[bits]);
    const __m512i upper = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i lower = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    for (int64_t g = 0; g < groups; g += 16, zeros += 128) {
        __m512i v[2];
        for (int half = 0; half < 2; half++) {
            v[half] = _mm512_setzero_si512();
            for (int i = 0; i < 8; i++, p += stride, left -= stride)
                v[half] = _mm512_mask_set1_epi64(v[half], (__mmask8)(1 << i), (long long)read_bytes(p, left));
            v[half] = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, v[half]), mask);
            v[half] = _mm512_permutexvar_epi8(order, v[half]); /* [row][group] */
        }
        _mm512_storeu_si512(zeros, _mm512_permutex2var_epi64(v[0], upper, v[1]));
        _mm512_storeu_si512(zeros + 64, _mm512_permutex2var_epi64(v[0], lower, v[1]));
    }
}
#endif

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

/* n halves as floats. */
#if X86
TARGET_AVX2 static void halves_f16c(const uint16_t *h, float *f, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(f + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
    for (; i < n; i++) f[i] = half_to_float(h[i]);
}
#endif

INLINE void halves(int level, const uint16_t *h, float *f, int64_t n) {
#if X86
    if (level) {
        halves_f16c(h, f, n);
        return;
    }
#endif
    for (int64_t i = 0; i < n; i++) f[i] = half_to_float(h[i]);
}

/* The zero points of 8 rows from n on, n a multiple of 8: zeros[g / 16][row][g % 16]. */
INLINE void eight_zeros(int level, const Matrix *w, int64_t out, int64_t n, int64_t groups, uint8_t *zeros) {
    int64_t row_bytes = (out * w->bits + 7) / 8, left = groups * row_bytes - n / 8 * w->bits;
    const uint8_t *p = w->zeros + n / 8 * w->bits;
#if X86
    if (level == 2) {
        zeros_512(p, row_bytes, left, w->bits, groups, zeros);
        return;
    }
    if (level == 1) {
        zeros_avx2(p, row_bytes, left, w->bits, groups, zeros);
        return;
    }
#endif
    for (int64_t g = 0; g < groups; g++, p += row_bytes, left -= row_bytes) {
        uint64_t codes = read_bytes(p, left);
        for (int r = 0; r < 8; r++, codes >>= w->bits)
            zeros[g / 16 * 128 + r * 16 + g % 16] = (uint8_t)(codes & ((1 << w->bits) - 1));
    }
}

INLINE void ask_for(const void *p, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)p + at);
}

/* Ask for what some_rows reads first of the rows from `first` on: it would wait for memory there. */
static void look_ahead(const Matrix *w, int64_t in, int64_t out, int64_t first) {
    int64_t groups = (in + w->group - 1) / w->group, row_bytes = (in * w->bits + 7) / 8;
    int64_t zero_bytes = (out * w->bits + 7) / 8;
    for (int64_t g = 0; g < groups && w->zeros; g++) ask_for(w->zeros + g * zero_bytes + first / 8 * w->bits, 1);
    ask_for(w->scales + first * groups, 16 * groups);
    for (int64_t at = 0; at < FAR; at += 64) __builtin_prefetch(w->codes + first * row_bytes + at, 0, 2);
}

#if X86
/* A block of codes, less the zero point of each 16, times their scale and x [n]. */
TARGET_512 static float apart_512(const uint8_t *codes, const uint8_t *end, int bits, const int32_t *zeros,
                                  const float *scales, const float *x, int64_t n) {
    __m512i v = _mm512_permutexvar_epi8(_mm512_loadu_si512(eights[bits]), load_512(codes, end, 8 * bits, 0));
    uint8_t c[BLOCK];
    __m512 sum = _mm512_setzero_ps();
    v = _mm512_multishift_epi64_epi8(_mm512_loadu_si512(in_bits[bits]), v);
    _mm512_storeu_si512(c, _mm512_and_si512(v, _mm512_set1_epi8((char)((1 << bits) - 1))));
    for (int u = 0; u < BLOCK / UNIT && u * UNIT < n; u++) {
        int64_t left = n - u * UNIT;
        __m512i of = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(c + u * UNIT)));
        __m512 w = _mm512_cvtepi32_ps(_mm512_sub_epi32(of, _mm512_set1_epi32(zeros[u])));
        __mmask16 there = left < 16 ? (__mmask16)((1u << left) - 1) : 0xFFFF;
        w = _mm512_mul_ps(w, _mm512_set1_ps(scales[u]));
        sum = _mm512_fmadd_ps(w, _mm512_maskz_loadu_ps(there, x + u * UNIT), sum);
    }
    return _mm512_reduce_add_ps(sum);
}
#endif

/* A row of w times the blocks of x that are left apart, in floats. */
INLINE float apart(int level, const Matrix *w, int64_t in, int64_t out, int64_t n, const float *x,
                   const uint8_t *blocks) {
    int64_t groups = (in + w->group - 1) / w->group, row_bytes = (in * w->bits + 7) / 8, bit = n * w->bits;
    int64_t zero_bytes = (out * w->bits + 7) / 8, mask = (1 << w->bits) - 1;
    const uint8_t *row = w->codes + n * row_bytes;
    float sum = 0, scales[BLOCK / UNIT];
    int32_t zeros[BLOCK / UNIT];
    for (int64_t b = 0; b * BLOCK < in; b++) {
        if (!blocks[b]) continue;
        int64_t at = b * BLOCK, end = at + BLOCK < in ? at + BLOCK : in;
        for (int64_t k = at, u = 0; k < end; k += UNIT, u++) {
            int64_t g = k / w->group;
            scales[u] = half_to_float(w->scales[n * groups + g]), zeros[u] = 1 << (w->bits - 1);
            if (!w->zeros) continue;
            const uint8_t *p = w->zeros + g * zero_bytes + bit / 8;
            zeros[u] = (int32_t)(read_bytes(p, zero_bytes - bit / 8) >> bit % 8 & mask);
        }
#if X86
        if (level == 2) {
            sum += apart_512(row + at * w->bits / 8, row + row_bytes, w->bits, zeros, scales, x + at, end - at);
            continue;
        }
#endif
        for (int64_t k = at; k < end; k++) {
            int64_t first = k * w->bits, code = read_bytes(row + first / 8, row_bytes - first / 8) >> first % 8 & mask;
            sum += scales[(k - at) / UNIT] * (float)(code - zeros[(k - at) / UNIT]) * x[k];
        }
    }
    return sum;
}

/* Floats of scratch for one product of m activations. */
static int64_t scratch_floats(int64_t stride, int64_t m) {
    int64_t units = stride / UNIT + 16, some = m > 8 ? m : 8;
    return 5 * units + m * units + some * (units + 17);
}

/* Rows first … last-1 (first a multiple of 8) of one matrix times m activations `rows` of a: y[to[r] * out + n]. */
INLINE void some_rows(int level, const Matrix *w, int64_t in, int64_t out, int64_t first, int64_t last,
                      const Activations *a, const float *x, const int32_t *rows, int m, float *y, const int32_t *to,
                      float *scratch) {
    int64_t groups = (in + w->group - 1) / w->group, row_bytes = (in * w->bits + 7) / 8;
    int64_t units = a->stride / UNIT, blocks = a->stride / BLOCK, room = units + 16, some = m > 8 ? m : 8;
    int uniform = w->group % BLOCK == 0, middle = w->zeros ? 0 : 1 << (w->bits - 1);
    int64_t steps = uniform ? blocks : units, per = w->group / (uniform ? BLOCK : UNIT);
    const float *step_sums = uniform ? a->block_sums : a->unit_sums;
    int batch = m == 1 ? 8 : 1, fast = level && per <= 16;
    int32_t of_step[256];
    float *s = scratch, *zs = s + room, *spread_out = zs + room, *sums = spread_out + room;
    uint8_t *zeros = (uint8_t *)(sums + m * room); /* 8 rows of them */
    float *both = sums + m * room + 2 * room, *start = both + some * room, *dots = start + some * 16;
    for (int i = 0; fast && i < 16 * per; i++) of_step[i] = (int32_t)(i / per);
    for (int r = 0; r < m; r++) /* [m, groups]: x over each group */
        for (int64_t g = 0; g < groups; g++) {
            if (per == 1) {
                memcpy(sums + r * groups, step_sums + rows[r] * steps, 4 * groups);
                break;
            }
            float sum = 0;
            for (int64_t u = g * per; u < (g + 1) * per && u < steps; u++) sum += step_sums[rows[r] * steps + u];
            sums[r * groups + g] = sum;
        }
    for (int64_t n8 = first; n8 < last; n8 += 8) {
        ask_for(w->scales + (n8 + 8) * groups, 16 * groups); /* for the next 8 rows */
        if (w->zeros) eight_zeros(level, w, out, n8, groups, zeros);
        for (int64_t n = n8; n < n8 + 8 && n < last; n += batch) {
            int taken = batch < last - n ? batch : (int)(last - n);
#if X86
            if (fast && level == 1)
                prepare_avx2(w->scales + n * groups, zeros + n % 8 * 16, middle, taken, m, a, rows, sums, groups, per,
                             uniform, of_step, both, start);
            else if (fast)
                prepare_512(w->scales + n * groups, zeros + n % 8 * 16, middle, taken, m, a, rows, sums, groups, per,
                            uniform, of_step, both, start);
#endif
            for (int i = 0; i < taken && !fast; i++) {
                const uint8_t *z = zeros + (n + i) % 8 * 16;
                halves(level, w->scales + (n + i) * groups, s, groups);
                for (int64_t g = groups; g < room; g++) s[g] = 0; /* steps past the last group meet x that are 0 */
                for (int64_t g = 0; g < room; g += 16)
                    for (int k = 0; k < 16; k++) zs[g + k] = s[g + k] * (middle ? (float)middle : (float)z[g * 8 + k]);
                for (int64_t g = 0, u = 0; u < steps; g++)
                    for (int64_t end = u + per; u < end && u < steps; u++) spread_out[u] = s[g];
                for (int r = 0; r < m; r++) {
                    const float *x_scale = a->scale + rows[r] * blocks, *sum = sums + r * groups;
                    float *restrict b = both + (i * m + r) * steps, *restrict less = start + (i * m + r) * 16;
                    if (uniform)
                        for (int64_t u = 0; u < steps; u++) b[u] = spread_out[u] * x_scale[u];
                    else
                        for (int64_t u = 0; u < steps; u++) b[u] = spread_out[u] * x_scale[u / (BLOCK / UNIT)];
                    int64_t g = 0;
                    for (int k = 0; k < 16; k++) less[k] = 0;
                    for (; g + 16 <= groups; g += 16)
                        for (int k = 0; k < 16; k++) less[k] -= zs[g + k] * sum[g + k];
                    for (; g < groups; g++) less[g % 16] -= zs[g] * sum[g];
                }
            }
            const uint8_t *codes = w->codes + n * row_bytes;
#if X86
            if (level == 2)
                for (int at = 0, left; (left = taken * m - at) > 0;) { /* pairs of rows, or up to 4 activations */
                    int nr = m == 1 && uniform && left > 1 ? 2 : 1, ms = m == 1 || left < 2 ? 1 : left < 4 ? 2 : 4;
                    DOTS_512[w->bits](nr, ms, codes + (m == 1 ? at * row_bytes : 0), row_bytes, both + at * steps,
                                      start + at * 16, a, m == 1 ? rows : rows + at, dots + at, uniform);
                    at += nr * ms;
                }
            else
#endif
                for (int i = 0; i < taken; i++) {
                    const uint8_t *row = codes + i * row_bytes;
                    float *d = dots + i * m;
#if X86
                    if (level == 1)
                        for (int r = 0, ms; r < m; r += ms) {
                            ms = m - r < 2 ? 1 : m - r < 4 ? 2 : 4;
                            DOTS_AVX2[w->bits](ms, row, row_bytes, both + (i * m + r) * steps,
                                               start + (i * m + r) * 16, a, rows + r, d + r, uniform);
                        }
                    else
#endif
                        dot_plain(row, row_bytes, w->bits, both + i * m * steps, start + i * m * 16, a, rows, m, d,
                                  uniform);
                }
            for (int i = 0; i < taken; i++)
                for (int r = 0; r < m; r++) y[to[r] * out + n + i] = dots[i * m + r];
        }
    }
    for (int r = 0; r < m; r++)
        if (memchr(a->apart + rows[r] * blocks, 1, blocks))
            for (int64_t n = first; n < last; n++)
                y[to[r] * out + n] += apart(level, w, in, out, n, x + rows[r] * in, a->apart + rows[r] * blocks);
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
    int level, fused, nspans; /* fused: down follows, on silu(gate) * up */
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

INLINE void product(int level, Call *c, const Product *p, long piece, float *scratch) {
    long of_span = (p->out + ROWS - 1) / ROWS;
    const Span *span = c->spans + piece / of_span;
    int64_t first = piece % of_span * ROWS, last = first + ROWS < p->out ? first + ROWS : p->out;
    const int32_t *to = c->pairs + span->start;
    const Span *next = c->spans + (piece + 1) / of_span;
    int64_t next_first = (piece + 1) % of_span * ROWS;
    for (int i = 0; i < 2 && p->of[i]; i++) {
        if (i == 0 && p->of[1])
            look_ahead(p->of[1] + span->expert, p->in, p->out, first);
        else if (next < c->spans + c->nspans)
            look_ahead(p->of[0] + next->expert, p->in, p->out, next_first);
        some_rows(level, p->of[i] + span->expert, p->in, p->out, first, last, &p->a, p->x,
                  p->rows + span->start, span->count, p->y[i], to, scratch);
    }
    if (c->fused && p == &c->first)
        for (int r = 0; r < span->count; r++) {
            float *gate = p->y[0] + to[r] * p->out, *up = p->y[1] + to[r] * p->out;
            for (int64_t n = first; n < last; n++) gate[n] = silu(gate[n]) * up[n];
            quantize_block(level, gate + first, last - first, &c->second.a, to[r], first / BLOCK);
            if (last == p->out && last <= c->second.a.stride - BLOCK)
                quantize_block(level, gate, 0, &c->second.a, to[r], last / BLOCK + (last % BLOCK > 0));
        }
}

INLINE void work_at(int level, Call *c, float *scratch) {
    Activations *a = &c->first.a;
    for (long row; (row = take(&c->quantizing)) >= 0; atomic_fetch_add(&c->quantizing.done, 1))
        for (int64_t b = 0; b < a->stride / BLOCK; b++)
            quantize_block(level, c->first.x + row * c->first.in + b * BLOCK, c->first.in - b * BLOCK, a, row, b);
    finish(&c->quantizing);
    for (long at; (at = take(&c->firsts)) >= 0; atomic_fetch_add(&c->firsts.done, 1))
        product(level, c, &c->first, at, scratch);
    if (!c->fused) return;
    finish(&c->firsts);
    for (long at; (at = take(&c->seconds)) >= 0; atomic_fetch_add(&c->seconds.done, 1))
        product(level, c, &c->second, at, scratch);
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
TARGET_512 static void work_512(Call *c, float *scratch) { work_at(2, c, scratch); }
TARGET_AVX2 static void work_avx2(Call *c, float *scratch) { work_at(1, c, scratch); }
#endif

static void work(Call *c, float *scratch) {
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
    work_at(0, c, scratch);
}

static pthread_mutex_t one_call = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, slept = PTHREAD_COND_INITIALIZER;
static int helpers, wanted, busy; /* threads made; to take part in this call; still at it */
static unsigned turn;
static Call *current;
static float *scratches;
static int fork_watched;

static void *helper(void *number) {
    int me = (int)(intptr_t)number;
    unsigned seen = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (turn == seen || me >= wanted) {
            seen = turn;
            pthread_cond_wait(&wake, &lock);
        }
        seen = turn;
        Call *c = current;
        float *scratch = scratches + (me + 1) * c->scratch_floats;
        pthread_mutex_unlock(&lock);
        work(c, scratch);
        pthread_mutex_lock(&lock);
        if (--busy == 0) pthread_cond_signal(&slept);
    }
    return 0;
}

static void after_fork(void) { /* threads do not survive a fork; they are made anew */
    helpers = wanted = busy = 0;
    pthread_mutex_init(&one_call, 0), pthread_mutex_init(&lock, 0);
    pthread_cond_init(&wake, 0), pthread_cond_init(&slept, 0);
}

static void run(Call *c, int threads, float *scratch) {
    pthread_mutex_lock(&one_call);
    pthread_mutex_lock(&lock);
    if (!fork_watched) fork_watched = 1, pthread_atfork(0, 0, after_fork);
    while (helpers < threads - 1) {
        pthread_t id;
        if (pthread_create(&id, 0, helper, (void *)(intptr_t)helpers)) break;
        pthread_detach(id);
        helpers++;
    }
    current = c, scratches = scratch, turn++;
    wanted = busy = threads - 1 < helpers ? threads - 1 : helpers;
    if (busy) pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    work(c, scratch);
    pthread_mutex_lock(&lock);
    while (busy) pthread_cond_wait(&slept, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&one_call);
}

/* ------------------------------------------------------------------------------------------- what Python calls */

/* A piece of the caller's room; addresses past its end are never used. */
static void *carve(char **at, int64_t bytes) {
    char *p = (char *)(((intptr_t)*at + 63) & ~(intptr_t)63);
    *at = p + bytes;
    return p;
}

static Activations carve_rows(char **at, int64_t rows, int64_t in) {
    Activations a = {.stride = (in + STEP - 1) / STEP * STEP};
    a.parts = carve(at, rows * 3 * a.stride), a.scale = carve(at, rows * (a.stride / BLOCK) * 4);
    a.block_sums = carve(at, rows * (a.stride / BLOCK) * 4), a.unit_sums = carve(at, rows * (a.stride / UNIT) * 4);
    a.apart = carve(at, rows * (a.stride / BLOCK));
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
   0, or how many bytes of room it takes, if there are fewer: nothing is done then. */
int64_t mopeq_experts(const Matrix *first, const Matrix *second, const Matrix *down, int64_t experts, int64_t in,
                      int64_t out, const float *x, int64_t x_rows, const int64_t *index, int64_t per,
                      const float *weight, float *y0, float *y1, int threads, int level, char *room, int64_t bytes) {
    int64_t pairs = x_rows * per;
    threads = threads > MAX_THREADS ? MAX_THREADS : threads;
    Call c = {.level = level, .fused = down != 0, .x_rows = x_rows, .index = index, .weight = weight, .k = per,
              .experts = experts, .out = y0};
    char *at = room;
    Span *spans = carve(&at, experts * sizeof(Span));
    int32_t *sorted = carve(&at, pairs * 4), *rows = carve(&at, pairs * 4);
    c.first = (Product){{first, second}, {y0, y1}, in, out, x, carve_rows(&at, x_rows, in), rows};
    int64_t stride = c.first.a.stride;
    if (down) {
        c.first.y[0] = carve(&at, pairs * out * 4), c.first.y[1] = carve(&at, pairs * out * 4);
        float *y = carve(&at, pairs * in * 4), *h = c.first.y[0];
        c.second = (Product){{down, 0}, {y, 0}, out, in, h, carve_rows(&at, pairs, out), sorted};
        stride = c.second.a.stride > stride ? c.second.a.stride : stride;
    }
    c.scratch_floats = (scratch_floats(stride, pairs) + 15) / 16 * 16;
    float *scratch = carve(&at, threads * c.scratch_floats * 4);
    if (at - room > bytes) return at - room;
    sort_pairs(&c, pairs, per, spans, sorted, rows);
    c.quantizing.total = x_rows, c.sums.total = x_rows;
    c.firsts.total = c.nspans * ((out + ROWS - 1) / ROWS), c.seconds.total = c.nspans * ((in + ROWS - 1) / ROWS);
    run(&c, threads, scratch);
    return 0;
}
