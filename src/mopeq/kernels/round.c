/* Round to nearest and pack, in one pass: what quant/rtn.py says in torch, bit for bit, each row while it is in the
   caches; and what is asked of weights before (extent.py). Built at first use (build.py); plain C that compilers turn
   into vectors.

   Only operations that IEEE 754 rounds exactly are used, and no product that is rounded is followed by an addition, so
   that nothing can be contracted: every machine and every width of vector gives the same bytes. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#define X86 1
#else
#define X86 0
#endif

enum { BF16 = 0, F32 = 1 };
enum { DONE = 0, SICK = 1, NO_MEMORY = 2 }; /* SICK: NaN, infinity or a range beyond fp16's scales: torch names it */

#define INLINE static inline __attribute__((always_inline))

#if X86
/* The bits of the widest vectors here. */
static int vectors(void) {
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 512;
    return __builtin_cpu_supports("avx2") ? 256 : 128;
}
#endif

/* The nearest integer, ties to even, of |x| < 2^22 (here: at most a few hundred). */
INLINE float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

/* rtn.stored_scale: the nearest fp16, but the next above where fp16 is subnormal. Returns its bits. */
INLINE uint16_t stored_scale(float scale, float *value) {
    if (scale < 0x1p-14f) {
        float steps = ceilf(scale * 0x1p24f);
        if (steps < 1) steps = 1;
        *value = steps * 0x1p-24f;
        return (uint16_t)steps;
    }
    uint32_t u;
    memcpy(&u, &scale, 4);
    u += 0xfff + ((u >> 13) & 1);
    u &= ~(uint32_t)0x1fff;
    memcpy(value, &u, 4);
    return (uint16_t)((u >> 13) - (112 << 10));
}

/* One group of n finite weights (their bits in x) -> scale, zero point (if asymmetric) and one code a byte.
   Floats of one sign are ordered as their bits are: integers are compared, which compilers turn into vectors. */
INLINE int group_codes(const uint32_t *x, int n, int bits, int symmetric, uint16_t *scales, uint8_t *zeros,
                       uint8_t *codes) {
    const float most = (float)((1 << bits) - 1);
    uint32_t lowest = 0x80000000u;
    int32_t highest = 0;
    for (int j = 0; j < n; j++) lowest = x[j] > lowest ? x[j] : lowest;
    for (int j = 0; j < n; j++) highest = (int32_t)x[j] > highest ? (int32_t)x[j] : highest;
    float low, high, scale, zero;
    memcpy(&low, &lowest, 4);
    memcpy(&high, &highest, 4);
    if (symmetric) {
        const int steps = (1 << (bits - 1)) - 1;
        const float below = -low / (float)(1 << (bits - 1)), above = high / (float)(steps ? steps : 1);
        scale = below > above ? below : above;
    } else {
        scale = (high - low) / most;
    }
    if (!(scale <= 65504.0f)) return SICK;
    *scales = stored_scale(scale, &scale);
    if (symmetric) {
        zero = (float)(1 << (bits - 1));
    } else {
        zero = nearest(-low / scale);
        zero = zero < 0 ? 0 : zero > most ? most : zero;
        *zeros = (uint8_t)zero;
    }
    for (int j = 0; j < n; j++) {
        float w;
        memcpy(&w, x + j, 4);
        float code = nearest(w / scale) + zero;
        code = code < 0 ? 0 : code;
        code = code > most ? most : code;
        codes[j] = (uint8_t)(int32_t)code;
    }
    return DONE;
}

/* One row of in-features. */
INLINE int row_codes(const uint32_t *x, int64_t in, int group, int bits, int symmetric, uint16_t *scales, uint8_t *zeros,
                     uint8_t *codes) {
    for (int64_t start = 0, g = 0; start < in; start += group, g++) {
        const int n = (int)(in - start < group ? in - start : group);
        uint8_t *z = symmetric ? zeros : zeros + g;
        const int found = n == 64 ? group_codes(x + start, 64, bits, symmetric, scales + g, z, codes + start)
                                  : group_codes(x + start, n, bits, symmetric, scales + g, z, codes + start);
        if (found != DONE) return found;
    }
    return DONE;
}

/* Eight codes of `bits` bits, one a byte (the first lowest) -> the low 8 * bits bits: neighbours close up, three times. */
INLINE uint64_t squeeze(uint64_t x, int bits) {
    x = (x & 0x00ff00ff00ff00ffu) | (x >> 8 & 0x00ff00ff00ff00ffu) << bits;
    x = (x & 0x0000ffff0000ffffu) | (x >> 16 & 0x0000ffff0000ffffu) << 2 * bits;
    return (x & 0xffffffffu) | x >> 32 << 4 * bits;
}

/* in codes (zeros follow, up to a multiple of eight) -> ceil(in * bits / 8) bytes. */
INLINE void pack_row(const uint8_t *codes, int64_t in, int bits, uint8_t *packed) {
    if (bits == 8) {
        memcpy(packed, codes, in);
        return;
    }
    const int64_t bytes = (in * bits + 7) / 8;
    int64_t at = 0;
    for (int64_t j = 0; j < in; j += 8) {
        uint64_t x = 0;
        for (int k = 0; k < 8; k++) x |= (uint64_t)codes[j + k] << 8 * k; /* one load where the machine allows */
        x = squeeze(x, bits);
        const int64_t count = bytes - at < bits ? bytes - at : bits;
        if (bytes - at >= 8) {
            for (int k = 0; k < 8; k++) packed[at + k] = (uint8_t)(x >> 8 * k);
        } else {
            for (int k = 0; k < count; k++) packed[at + k] = (uint8_t)(x >> 8 * k);
        }
        at += count;
    }
}

INLINE int rows(const void *w, int kind, int64_t out, int64_t in, int group, int bits, int symmetric, uint8_t *packed,
                uint16_t *scales, uint8_t *zeros) {
    const int64_t bytes = (in * bits + 7) / 8, groups = (in + group - 1) / group, room = (in + 7) / 8 * 8;
    uint32_t *wide = malloc(room * sizeof(uint32_t));
    uint8_t *codes = malloc(room);
    int found = wide && codes ? DONE : NO_MEMORY;
    if (codes) memset(codes, 0, room);
    for (int64_t r = 0; r < out && found == DONE; r++) {
        const uint32_t *x = (const uint32_t *)w + r * in;
        if (kind == BF16) {
            const uint16_t *narrow = (const uint16_t *)w + r * in;
            for (int64_t j = 0; j < in; j++) wide[j] = (uint32_t)narrow[j] << 16;
            x = wide;
        }
        uint32_t sick = 0;
        for (int64_t j = 0; j < in; j++) sick |= (x[j] & 0x7f800000u) == 0x7f800000u;
        uint8_t *z = symmetric ? zeros : zeros + r * groups;
        found = sick ? SICK : row_codes(x, in, group, bits, symmetric, scales + r * groups, z, codes);
        if (found == DONE) pack_row(codes, in, bits, packed + r * bytes);
    }
    free(wide);
    free(codes);
    return found;
}

#define ROWS(name, attribute)                                                                                        \
    attribute static int name(const void *w, int kind, int64_t out, int64_t in, int group, int bits, int symmetric,   \
                              uint8_t *packed, uint16_t *scales, uint8_t *zeros) {                                    \
        return rows(w, kind, out, in, group, bits, symmetric, packed, scales, zeros);                                 \
    }

ROWS(rows_plain, )
#if X86
ROWS(rows_avx2, __attribute__((target("avx2"))))
ROWS(rows_512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

/* w [out, in], bf16 or float32 -> packed [out, ceil(in * bits / 8)], fp16 scales [out, groups], zero points, one a
   byte [out, groups] (not touched if symmetric). */
int mopeq_round(const void *w, int kind, int64_t out, int64_t in, int group, int bits, int symmetric, uint8_t *packed,
                uint16_t *scales, uint8_t *zeros) {
#if X86
    switch (vectors()) {
        case 512: return rows_512(w, kind, out, in, group, bits, symmetric, packed, scales, zeros);
        case 256: return rows_avx2(w, kind, out, in, group, bits, symmetric, packed, scales, zeros);
    }
#endif
    return rows_plain(w, kind, out, in, group, bits, symmetric, packed, scales, zeros);
}

/* ------------------------------------------------------------------------------------- what weights are, all together */

INLINE uint32_t wide(const void *w, int kind, int64_t j) {
    return kind == BF16 ? (uint32_t)((const uint16_t *)w)[j] << 16 : ((const uint32_t *)w)[j];
}

enum { LANES = 16 }; /* sums side by side, on every machine, so that all add in the same order */

/* The bits of the largest |w|: those of infinity or of a NaN, which are above all others, where there is one. */
INLINE uint32_t largest(const void *w, int kind, int64_t count) {
    uint32_t most = 0;
    for (int64_t j = 0; j < count; j++) {
        const uint32_t x = wide(w, kind, j) & 0x7fffffffu;
        most = x > most ? x : most;
    }
    return most;
}

/* A weight's square, which is exact in double. */
INLINE double square(const void *w, int kind, int64_t j) {
    const uint32_t bits = wide(w, kind, j);
    float x;
    memcpy(&x, &bits, 4);
    return (double)x * (double)x;
}

/* The sum of w^2. */
INLINE double squares(const void *w, int kind, int64_t count) {
    double sums[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES)
        for (int k = 0; k < LANES; k++) sums[k] += square(w, kind, j + k);
    for (int k = 0; j < count; j++, k++) sums[k] += square(w, kind, j);
    for (int half = LANES / 2; half; half /= 2)
        for (int k = 0; k < half; k++) sums[k] += sums[k + half];
    return sums[0];
}

#define EXTENT(name, attribute)                                                                                      \
    attribute static void name(const void *w, int kind, int64_t count, double *sum, uint32_t *most) {                 \
        if (sum) *sum = kind == BF16 ? squares(w, BF16, count) : squares(w, F32, count);                              \
        if (most) *most = kind == BF16 ? largest(w, BF16, count) : largest(w, F32, count);                            \
    }

EXTENT(extent_plain, )
#if X86
EXTENT(extent_avx2, __attribute__((target("avx2"))))
EXTENT(extent_512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

/* w [count], bf16 or float32 -> the sum of its squares and the bits of its largest |w|, each where it is asked for. */
void mopeq_extent(const void *w, int kind, int64_t count, double *sum, uint32_t *most) {
#if X86
    switch (vectors()) {
        case 512: extent_512(w, kind, count, sum, most); return;
        case 256: extent_avx2(w, kind, count, sum, most); return;
    }
#endif
    extent_plain(w, kind, count, sum, most);
}
