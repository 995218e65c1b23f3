/* Rows of packed matrices times a few activations, on a CPU. Built at first use by kernels/cpu.py; plain C, POSIX threads.

   A row's codes are one little-endian bit stream (docs/format.md), read as stored: nothing is re-arranged or copied.
   Activations become 22-bit integers with one float scale for each 64 of them (rounded to 2^-22 of the block's
   largest, so results are float32's), so code * activation is exact integer arithmetic and the unpacking ends in byte or word dot products:

     AVX-512 (VBMI, VNNI)  64 codes: one byte permute, one multishift, one mask, two dot products, at any width 1..8
     AVX2                  16 codes: one byte shuffle, multiply as variable shift, one mask, one multiply-add
     plain C               whatever the compiler makes of it

   sum_k (code - zero) * scale * x  =  sum_groups scale * (sum code * x  -  zero * sum x). */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sched.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define X86 1
#else
#define X86 0
#endif

enum { MOST = 127 * 128 * 128, /* of a quantized activation: four times a code of 8 bits fits 31 bits */
       BLOCK = 64, UNIT = 16, ROWS = 32, MAX_THREADS = 256 };

/* One matrix and the m activations it is multiplied with: y[r, n] for r < m, n < out. */
typedef struct {
    const uint8_t *codes;   /* [out, row_bytes] */
    const uint16_t *scales; /* fp16 [out, groups] */
    const uint8_t *zeros;   /* [groups, ceil(out * bits / 8)], or NULL: 2^(bits-1) everywhere */
    const int32_t *rows;    /* [m]: which activation */
    float *y;               /* [m, out] */
    int32_t m, bits, group, out, in, pad;
} Job;

/* Activations after `quantize`: stride = in rounded up to BLOCK. */
typedef struct {
    int8_t *high; /* [rows, stride]  x / scale = (high * 128 + mid) * 128 + low, each from -64 to 63 but for high */
    int8_t *mid;
    int8_t *low;
    int16_t *words; /* high * 128 + mid */
    float *scale; /* [rows, stride / BLOCK] */
    float *sums;  /* [rows, stride / UNIT]  sums of scale * words */
    int64_t stride;
} Activations;

static void quantize_row(const float *x, int64_t in, const Activations *a, int64_t row) {
    int16_t *words = a->words + row * a->stride;
    int8_t *high = a->high + row * a->stride, *mid = a->mid + row * a->stride, *low = a->low + row * a->stride;
    for (int64_t at = 0; at < a->stride; at += BLOCK) {
        float top = 0;
        for (int64_t k = at; k < at + BLOCK && k < in; k++) {
            float v = x[k] < 0 ? -x[k] : x[k];
            top = v > top ? v : top;
        }
        float scale = top / MOST, inverse = scale > 0 ? 1 / scale : 0;
        if (!(inverse < 3e38f)) scale = inverse = 0; /* a block of denormals counts as zeros */
        int sane = top < 3e38f;
        for (int64_t k = at; k < at + BLOCK; k++) {
            float v = k < in ? x[k] : 0;
            sane &= v == v;
            float scaled = v * inverse;
            int q = sane ? (int)(scaled + (scaled < 0 ? -0.5f : 0.5f)) : 0;
            int lo = ((q + 64) & 127) - 64, word = (q - lo) / 128, middle = ((word + 64) & 127) - 64;
            words[k] = (int16_t)word, low[k] = (int8_t)lo, mid[k] = (int8_t)middle;
            high[k] = (int8_t)((word - middle) / 128);
        }
        if (!sane) scale = 0.0f / 0.0f; /* infinite and NaN activations give NaN, as any product would */
        a->scale[row * (a->stride / BLOCK) + at / BLOCK] = scale;
        for (int u = 0; u < BLOCK / UNIT; u++) {
            int sum = 0;
            for (int k = at + u * UNIT; k < at + (u + 1) * UNIT; k++) sum += words[k] * 128 + low[k];
            a->sums[row * (a->stride / UNIT) + at / UNIT + u] = scale * (float)sum;
        }
    }
}

static float half_to_float(uint16_t h) {
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
static inline __attribute__((always_inline)) uint64_t read_bytes(const uint8_t *p, int64_t bytes) {
    uint64_t v = 0;
    memcpy(&v, p, bytes < 8 ? (bytes < 0 ? 0 : bytes) : 8);
    return v;
}

/* One row of codes times m activations: sums of scales * (code . words). `scales` [m, steps] has the weights' scale times
   the activations', for each block if `uniform`, else for each unit. So have the other dot_… below. */
static void dot_plain(const uint8_t *codes, int64_t row_bytes, int bits, const float *scales, const Activations *a,
                      const int32_t *rows, int m, float *out, int uniform) {
    int mask = (1 << bits) - 1;
    int64_t steps = a->stride / (uniform ? BLOCK : UNIT);
    for (int r = 0; r < m; r++) out[r] = 0;
    for (int64_t at = 0; at < a->stride; at += UNIT) {
        int16_t c[UNIT];
        for (int half = 0; half < 2; half++) {
            int64_t byte = (at + 8 * half) * bits / 8;
            uint64_t v = read_bytes(codes + byte, row_bytes - byte);
            for (int j = 0; j < 8; j++) c[8 * half + j] = (int16_t)((v >> (j * bits)) & mask);
        }
        for (int r = 0; r < m; r++) {
            const int16_t *x = a->words + rows[r] * a->stride + at;
            const int8_t *low = a->low + rows[r] * a->stride + at;
            int32_t sum = 0, rest = 0;
            for (int k = 0; k < UNIT; k++) sum += (int32_t)c[k] * x[k], rest += (int32_t)c[k] * low[k];
            out[r] += ((float)sum * 128 + (float)rest) * scales[r * steps + (uniform ? at / BLOCK : at / UNIT)];
        }
    }
}

#if X86
#define TARGET_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,f16c,fma,avx2")))
#define TARGET_AVX2 __attribute__((target("avx2,f16c,fma")))

static uint8_t spread[9][64], shifts[9][64]; /* by width: where a byte of 8 codes comes from; where a code begins */

__attribute__((constructor)) static void make_tables(void) {
    for (int bits = 1; bits <= 8; bits++)
        for (int i = 0; i < 64; i++) {
            int byte = i % 8;
            spread[bits][i] = (uint8_t)(i / 8 * bits + (byte < bits ? byte : 0));
            shifts[bits][i] = (uint8_t)(byte * bits);
        }
}

/* 64 codes at p, of which only those under `there` are read, times MS activations. */
#define STEP_512(MS, BITS, P, THERE)                                                                                  \
    do {                                                                                                              \
        __m512i v = _mm512_permutexvar_epi8(spread_v, _mm512_maskz_loadu_epi8(THERE, P));                             \
        v = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift_v, v), mask_v);                                       \
        for (int r = 0; r < MS; r++) {                                                                                \
            __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), v, _mm512_loadu_si512(high[r] + b * BLOCK));    \
            dot = _mm512_dpbusd_epi32(_mm512_slli_epi32(dot, 7), v, _mm512_loadu_si512(mid[r] + b * BLOCK));          \
            dot = _mm512_dpbusd_epi32(_mm512_slli_epi32(dot, 7), v, _mm512_loadu_si512(low[r] + b * BLOCK));          \
            __m512 s = uniform ? _mm512_set1_ps(scales[r * steps + b])                                                \
                               : _mm512_permutexvar_ps(                                                               \
                                     lanes, _mm512_castps128_ps512(_mm_loadu_ps(scales + r * steps + b * 4)));        \
            sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), s, sum[r]);                                             \
        }                                                                                                             \
    } while (0)

/* MS activations at once. */
#define DOT_512(MS, BITS)                                                                                             \
    TARGET_512 static void dot_512_##MS##_##BITS(const uint8_t *codes, int64_t row_bytes, const float *scales,        \
                                                 const Activations *a, const int32_t *rows, float *out, int uniform) {\
        const __m512i spread_v = _mm512_loadu_si512(spread[BITS]), shift_v = _mm512_loadu_si512(shifts[BITS]);        \
        const __m512i mask_v = _mm512_set1_epi8((char)((1 << BITS) - 1));                                             \
        const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);                      \
        const __mmask64 whole = BITS == 8 ? ~0ull : (1ull << (8 * BITS % 64)) - 1;                                    \
        int64_t last = a->stride / BLOCK - 1, steps = a->stride / (uniform ? BLOCK : UNIT), b = 0;                    \
        const int8_t *high[MS], *mid[MS], *low[MS];                                                                   \
        __m512 sum[MS];                                                                                               \
        for (int r = 0; r < MS; r++) {                                                                                \
            high[r] = a->high + rows[r] * a->stride, mid[r] = a->mid + rows[r] * a->stride;                           \
            low[r] = a->low + rows[r] * a->stride;                                                                    \
            sum[r] = _mm512_setzero_ps();                                                                             \
        }                                                                                                             \
        for (; b < last; b++) {                                                                                       \
            _mm_prefetch((const char *)(codes + b * 8 * BITS + 2048), _MM_HINT_T0);                                   \
            STEP_512(MS, BITS, codes + b * 8 * BITS, whole);                                                          \
        }                                                                                                             \
        __mmask64 there = row_bytes - b * 8 * BITS >= 64 ? whole : (1ull << (row_bytes - b * 8 * BITS)) - 1;          \
        STEP_512(MS, BITS, codes + b * 8 * BITS, there);                                                              \
        for (int r = 0; r < MS; r++) out[r] = _mm512_reduce_add_ps(sum[r]);                                           \
    }
/* Two rows of codes, `row_bytes` apart, times one activation: its loads are shared. `scales` [2, steps]. */
#define STEP_512_PAIR(BITS, THERE)                                                                                    \
    do {                                                                                                              \
        __m512i hi = _mm512_loadu_si512(high + b * BLOCK), middle = _mm512_loadu_si512(mid + b * BLOCK);              \
        __m512i lo = _mm512_loadu_si512(low + b * BLOCK);                                                             \
        for (int r = 0; r < 2; r++) {                                                                                 \
            const uint8_t *p = codes + r * row_bytes + b * 8 * BITS;                                                  \
            _mm_prefetch((const char *)(p + 2048), _MM_HINT_T0);                                                      \
            __m512i v = _mm512_permutexvar_epi8(spread_v, _mm512_maskz_loadu_epi8(THERE, p));                         \
            v = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift_v, v), mask_v);                                   \
            __m512i dot = _mm512_slli_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), v, hi), 7);                   \
            dot = _mm512_slli_epi32(_mm512_dpbusd_epi32(dot, v, middle), 7);                                          \
            dot = _mm512_dpbusd_epi32(dot, v, lo);                                                                    \
            sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scales[r * steps + b]), sum[r]);         \
        }                                                                                                             \
    } while (0)

#define PAIR_512(BITS)                                                                                                \
    TARGET_512 static void pair_512_##BITS(const uint8_t *codes, int64_t row_bytes, const float *scales,              \
                                           const Activations *a, int32_t row, float *out) {                           \
        const __m512i spread_v = _mm512_loadu_si512(spread[BITS]), shift_v = _mm512_loadu_si512(shifts[BITS]);        \
        const __m512i mask_v = _mm512_set1_epi8((char)((1 << BITS) - 1));                                             \
        const __mmask64 whole = BITS == 8 ? ~0ull : (1ull << (8 * BITS % 64)) - 1;                                    \
        int64_t steps = a->stride / BLOCK, last = steps - 1, b = 0;                                                   \
        const int8_t *high = a->high + row * a->stride, *mid = a->mid + row * a->stride;                              \
        const int8_t *low = a->low + row * a->stride;                                                                 \
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};                                                   \
        for (; b < last; b++) STEP_512_PAIR(BITS, whole);                                                             \
        __mmask64 there = row_bytes - b * 8 * BITS >= 64 ? whole : (1ull << (row_bytes - b * 8 * BITS)) - 1;          \
        STEP_512_PAIR(BITS, there);                                                                                   \
        out[0] = _mm512_reduce_add_ps(sum[0]), out[1] = _mm512_reduce_add_ps(sum[1]);                                 \
    }
PAIR_512(1) PAIR_512(2) PAIR_512(3) PAIR_512(4) PAIR_512(5) PAIR_512(6) PAIR_512(7) PAIR_512(8)
typedef void Pair512(const uint8_t *, int64_t, const float *, const Activations *, int32_t, float *);
static Pair512 *const PAIRS_512[8] = {pair_512_1, pair_512_2, pair_512_3, pair_512_4,
                                      pair_512_5, pair_512_6, pair_512_7, pair_512_8};

#define DOT_512_ALL(BITS) DOT_512(1, BITS) DOT_512(2, BITS) DOT_512(4, BITS)
DOT_512_ALL(1) DOT_512_ALL(2) DOT_512_ALL(3) DOT_512_ALL(4) DOT_512_ALL(5) DOT_512_ALL(6) DOT_512_ALL(7) DOT_512_ALL(8)

typedef void Dot512(const uint8_t *, int64_t, const float *, const Activations *, const int32_t *, float *, int);
#define ROW_512(MS)                                                                                                   \
    {dot_512_##MS##_1, dot_512_##MS##_2, dot_512_##MS##_3, dot_512_##MS##_4,                                          \
     dot_512_##MS##_5, dot_512_##MS##_6, dot_512_##MS##_7, dot_512_##MS##_8}
static Dot512 *const DOTS_512[3][8] = {ROW_512(1), ROW_512(2), ROW_512(4)};

TARGET_AVX2 static void dot_avx2(const uint8_t *codes, int64_t row_bytes, int bits, const float *scales,
                                 const Activations *a, const int32_t *rows, int m, float *out, int uniform) {
    uint8_t pick[32];
    int16_t factor[16];
    for (int i = 0; i < 16; i++) { /* a code lies in two bytes; times 2^(8 - shift), then >> 8, brings it to bit 0 */
        int byte = (i % 8) * bits / 8, shift = (i % 8) * bits % 8;
        pick[2 * i] = (uint8_t)byte, pick[2 * i + 1] = (uint8_t)(byte + 1 < 8 ? byte + 1 : 0x80);
        factor[i] = (int16_t)(1 << (8 - shift));
    }
    int64_t steps = a->stride / (uniform ? BLOCK : UNIT);
    const __m256i pick_v = _mm256_loadu_si256((const __m256i *)pick);
    const __m256i factor_v = _mm256_loadu_si256((const __m256i *)factor);
    const __m256i mask_v = _mm256_set1_epi16((int16_t)((1 << bits) - 1));
    for (int r0 = 0; r0 < m; r0 += 4) {
        int ms = m - r0 < 4 ? m - r0 : 4;
        __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t at = 0; at < a->stride; at += UNIT) {
            const uint8_t *p = codes + at * bits / 8;
            int64_t left = row_bytes - at * bits / 8;
            uint64_t first, second;
            if (left >= bits + 8) {
                memcpy(&first, p, 8), memcpy(&second, p + bits, 8);
            } else {
                first = read_bytes(p, left), second = read_bytes(p + bits, left - bits);
            }
            __m256i v = _mm256_set_epi64x(0, (long long)second, 0, (long long)first);
            v = _mm256_mullo_epi16(_mm256_shuffle_epi8(v, pick_v), factor_v);
            v = _mm256_and_si256(_mm256_srli_epi16(v, 8), mask_v);
            for (int r = 0; r < ms; r++) {
                int64_t row = rows[r0 + r];
                __m256i x = _mm256_loadu_si256((const __m256i *)(a->words + row * a->stride + at));
                __m256i rest = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(a->low + row * a->stride + at)));
                __m256i whole = _mm256_slli_epi32(_mm256_madd_epi16(v, x), 7);
                __m256 dot = _mm256_cvtepi32_ps(_mm256_add_epi32(whole, _mm256_madd_epi16(v, rest)));
                float s = scales[(r0 + r) * steps + (uniform ? at / BLOCK : at / UNIT)];
                sum[r] = _mm256_fmadd_ps(dot, _mm256_set1_ps(s), sum[r]);
            }
        }
        for (int r = 0; r < ms; r++) {
            __m128 h = _mm_add_ps(_mm256_castps256_ps128(sum[r]), _mm256_extractf128_ps(sum[r], 1));
            h = _mm_add_ps(h, _mm_movehl_ps(h, h));
            out[r0 + r] = _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
        }
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

static void dot_row(int level, const Job *j, const uint8_t *codes, int64_t row_bytes, const float *scales,
                    const Activations *a, int uniform, float *out) {
#if X86
    if (level == 2) {
        int64_t steps = a->stride / (uniform ? BLOCK : UNIT);
        for (int r = 0; r < j->m;) {
            int which = j->m - r >= 4 ? 2 : j->m - r >= 2 ? 1 : 0;
            DOTS_512[which][j->bits - 1](codes, row_bytes, scales + r * steps, a, j->rows + r, out + r, uniform);
            r += 1 << which;
        }
        return;
    }
    if (level == 1) {
        dot_avx2(codes, row_bytes, j->bits, scales, a, j->rows, j->m, out, uniform);
        return;
    }
#endif
    dot_plain(codes, row_bytes, j->bits, scales, a, j->rows, j->m, out, uniform);
}

/* n halves as floats. */
#if X86
TARGET_AVX2 static void halves_f16c(const uint16_t *h, float *f, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(f + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
    for (; i < n; i++) f[i] = half_to_float(h[i]);
}
#endif

static void halves(int level, const uint16_t *h, float *f, int64_t n) {
#if X86
    if (level) {
        halves_f16c(h, f, n);
        return;
    }
#endif
    for (int64_t i = 0; i < n; i++) f[i] = half_to_float(h[i]);
}

#if X86
/* `row_zeros` 16 groups at a time, as long as 4 bytes from each zero point can be read; how many groups were done. */
TARGET_512 static int64_t zeros_512(const uint8_t *p, int64_t zero_bytes, int64_t byte, int shift, int mask,
                                    int64_t groups, const float *scales, float *zeros) {
    __m512i at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                    _mm512_set1_epi32((int)zero_bytes));
    int64_t g = 0;
    for (; g + 16 <= groups && byte + (g + 15) * zero_bytes + 4 <= groups * zero_bytes; g += 16) {
        __m512i v = _mm512_i32gather_epi32(at, p + g * zero_bytes, 1);
        v = _mm512_and_si512(_mm512_srl_epi32(v, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(mask));
        _mm512_storeu_ps(zeros + g, _mm512_mul_ps(_mm512_cvtepi32_ps(v), _mm512_loadu_ps(scales + g)));
    }
    return g;
}
#endif

/* A row's zero points times its scales, for each group: zeros[g] = scales[g] * zero. */
static inline __attribute__((always_inline)) void row_zeros(int level, const Job *j, int n, int64_t groups,
                                                            const float *scales, float *zeros) {
    if (!j->zeros) {
        for (int64_t g = 0; g < groups; g++) zeros[g] = (float)(1 << (j->bits - 1)) * scales[g];
        return;
    }
    int64_t zero_bytes = ((int64_t)j->out * j->bits + 7) / 8, bit = (int64_t)n * j->bits, byte = bit / 8, g = 0;
    int shift = bit % 8, mask = (1 << j->bits) - 1;
    const uint8_t *p = j->zeros + byte;
#if X86
    if (level == 2 && zero_bytes < 1 << 26) g = zeros_512(p, zero_bytes, byte, shift, mask, groups, scales, zeros);
#endif
    (void)level;
    for (; g < groups; g++) {
        int v = p[g * zero_bytes];
        if (byte + 1 < zero_bytes) v |= p[g * zero_bytes + 1] << 8; /* else the code lies in the last byte */
        zeros[g] = (float)(v >> shift & mask) * scales[g];
    }
}

/* Rows first … last-1 of one job; scratch as mopeq_scratch says. */
static inline __attribute__((always_inline)) void some_rows(int level, const Job *j, const Activations *a, int first,
                                                            int last, float *restrict scratch) {
    int64_t groups = (j->in + j->group - 1) / j->group, row_bytes = ((int64_t)j->in * j->bits + 7) / 8;
    int64_t units = a->stride / UNIT, blocks = a->stride / BLOCK;
    int uniform = j->group % BLOCK == 0, many = level == 2 && uniform && j->m == 1 ? 2 : 1; /* rows at a time */
    int64_t size = uniform ? BLOCK : UNIT, per = j->group / size, steps = a->stride / size;
    float *scales = scratch, *zeros = scales + groups, *spread_out = zeros + groups, *out = spread_out + units;
    float *less = out + 2 * j->m, *sums = less + 2 * j->m; /* less: what the zero points take away */
    float *both = sums + j->m * groups;                    /* sums [m, groups]: x over each group; both [rows, steps] */
    for (int r = 0; r < j->m; r++)
        for (int64_t g = 0, per_sum = j->group / UNIT; g < groups; g++) {
            float sum = 0;
            for (int64_t u = g * per_sum; u < (g + 1) * per_sum && u < units; u++) sum += a->sums[j->rows[r] * units + u];
            sums[r * groups + g] = sum;
        }
    for (int n = first; n < last;) {
        int taken = n + many <= last ? many : 1;
        for (int i = 0; i < taken; i++) {
            halves(level, j->scales + (n + i) * groups, scales, groups);
            row_zeros(level, j, n + i, groups, scales, zeros);
            const float *of_steps = scales;
            if (per > 1 || groups < steps) { /* steps beyond the last group meet activations that are 0 */
                for (int64_t g = 0; g < groups; g++)
                    for (int64_t u = g * per; u < (g + 1) * per && u < steps; u++) spread_out[u] = scales[g];
                for (int64_t u = groups * per; u < steps; u++) spread_out[u] = 0;
                of_steps = spread_out;
            }
            for (int r = 0; r < j->m; r++) {
                const float *x = a->scale + j->rows[r] * blocks;
                float *restrict to = both + (i * j->m + r) * steps;
                if (uniform)
                    for (int64_t b = 0; b < steps; b++) to[b] = of_steps[b] * x[b];
                else
                    for (int64_t u = 0; u < steps; u++) to[u] = of_steps[u] * x[u / (BLOCK / UNIT)];
                float lanes[16] = {0}; /* so that compilers may use vectors */
                const float *of = sums + r * groups;
                int64_t g = 0;
                for (; g + 16 <= groups; g += 16)
                    for (int k = 0; k < 16; k++) lanes[k] += zeros[g + k] * of[g + k];
                for (int k = 0; k < 16 && g + k < groups; k++) lanes[k] += zeros[g + k] * of[g + k];
                for (int half = 8; half; half /= 2)
                    for (int k = 0; k < half; k++) lanes[k] += lanes[k + half];
                less[i * j->m + r] = lanes[0];
            }
        }
        const uint8_t *codes = j->codes + n * row_bytes;
#if X86
        if (taken == 2)
            PAIRS_512[j->bits - 1](codes, row_bytes, both, a, j->rows[0], out);
        else
#endif
            dot_row(level, j, codes, row_bytes, both, a, uniform, out);
        for (int i = 0; i < taken; i++, n++)
            for (int r = 0; r < j->m; r++) j->y[(int64_t)r * j->out + n] = out[i * j->m + r] - less[i * j->m + r];
    }
}

#if X86
TARGET_512 static void some_rows_512(const Job *j, const Activations *a, int first, int last, float *scratch) {
    some_rows(2, j, a, first, last, scratch);
}
TARGET_AVX2 static void some_rows_avx2(const Job *j, const Activations *a, int first, int last, float *scratch) {
    some_rows(1, j, a, first, last, scratch);
}
#endif

static void some_rows_at(int level, const Job *j, const Activations *a, int first, int last, float *scratch) {
#if X86
    if (level == 2) {
        some_rows_512(j, a, first, last, scratch);
        return;
    }
    if (level == 1) {
        some_rows_avx2(j, a, first, last, scratch);
        return;
    }
#endif
    some_rows(0, j, a, first, last, scratch);
}

/* ------------------------------------------------------------------------------- one call, shared among threads */

typedef struct {
    const float *x;
    int64_t x_rows, in;
    Activations a;
    const Job *jobs;
    int njobs, level;
    atomic_int next_row, rows_done, next_piece;
    int pieces;
    int64_t scratch_floats;
} Call;

static void work(Call *c, float *scratch) {
    for (int row; (row = atomic_fetch_add(&c->next_row, 1)) < c->x_rows;) {
        quantize_row(c->x + row * c->in, c->in, &c->a, row);
        atomic_fetch_add(&c->rows_done, 1);
    }
    while (atomic_load(&c->rows_done) < c->x_rows) sched_yield();
    for (int piece; (piece = atomic_fetch_add(&c->next_piece, 1)) < c->pieces;) {
        const Job *j = c->jobs;
        int at = piece;
        for (int n; at >= (n = (j->out + ROWS - 1) / ROWS); j++) at -= n;
        int first = at * ROWS, last = first + ROWS < j->out ? first + ROWS : j->out;
        some_rows_at(c->level, j, &c->a, first, last, scratch);
    }
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

/* Floats of scratch one thread needs for these jobs. */
int64_t mopeq_scratch(const Job *jobs, int njobs, int64_t stride) {
    int64_t most = 0;
    for (int i = 0; i < njobs; i++) {
        int64_t groups = (jobs[i].in + jobs[i].group - 1) / jobs[i].group;
        int64_t units = stride / UNIT, need = units + jobs[i].m * (4 + 2 * units) + (jobs[i].m + 2) * groups + 16;
        most = need > most ? need : most;
    }
    return most;
}

/* y of every job from x [x_rows, in]. Buffers are the caller's: `a` as its struct says, scratch [threads, floats]. */
void mopeq_rows(const float *x, int64_t x_rows, int64_t in, const Activations *a, const Job *jobs, int njobs,
                int threads, int level, float *scratch, int64_t scratch_floats) {
    Call c = {.x = x, .x_rows = x_rows, .in = in, .a = *a, .jobs = jobs, .njobs = njobs, .level = level,
              .scratch_floats = scratch_floats};
    for (int i = 0; i < njobs; i++) c.pieces += (jobs[i].out + ROWS - 1) / ROWS;
    threads = threads > MAX_THREADS ? MAX_THREADS : threads;
    pthread_mutex_lock(&one_call);
    pthread_mutex_lock(&lock);
    if (!fork_watched) fork_watched = 1, pthread_atfork(0, 0, after_fork);
    while (helpers < threads - 1) {
        pthread_t id;
        if (pthread_create(&id, 0, helper, (void *)(intptr_t)helpers)) break;
        pthread_detach(id);
        helpers++;
    }
    current = &c, scratches = scratch, turn++;
    wanted = busy = threads - 1 < helpers ? threads - 1 : helpers;
    if (busy) pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    work(&c, scratch);
    pthread_mutex_lock(&lock);
    while (busy) pthread_cond_wait(&slept, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&one_call);
}
