/* Products of small matrices, on which sensing and gptq spend their time, for x86 with AVX2, AVX-512 or AMX.

   Right factors are tiles of 64 lanes (or 16), a lane a column: the order of a lane's sums is the same with AVX2 and
   AVX-512 and any number of threads. AMX takes both factors in bf16 and sums in float32. */

#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define EACH_LANE for (int l = 0; l < lanes; l++)
#define UNROLL _Pragma("GCC unroll 8")
#define WITH_AVX2 __attribute__((target("avx2,fma")))
#ifdef __clang__ /* which ignores all of an attribute where it does not know a part */
#define WIDE ""
#else
#define WIDE ",prefer-vector-width=512"
#endif
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c" WIDE)))

enum { DONE = 0, NO_MEMORY = 1 };     /* what a thread's share ends with */
enum { LANES = 64, FEW_LANES = 16 }; /* of a tile */
enum { NONE, AVX2, AVX512, AMX };    /* sets of instructions, each with those before */
enum { PAD = 32 };                   /* bf16 between rows, lest they all fall on one line of a cache */

/* name(...): c [rows, lanes] (+)= a [rows, n] b [n, lanes], rows of a `stride` apart; four rows of `most` vectors of
   `size` lanes at a time stay in registers. Tiles have 64 lanes or 16. */
#define PRODUCT(name, attribute, vec, size, most)                                                                     \
    typedef float vec __attribute__((vector_size(4 * size), aligned(4), may_alias));                                  \
    INLINE void name##_rows(int rows, int64_t n, const float *a, int64_t stride, const float *b, float *c, int lanes, \
                            int width, int add) {                                                                     \
        for (int at = 0; at < lanes; at += width * size) {                                                            \
            vec sum[4][most];                                                                                         \
            UNROLL for (int i = 0; i < rows; i++) {                                                                   \
                UNROLL for (int v = 0; v < width; v++) {                                                              \
                    sum[i][v] = add ? *(const vec *)(c + i * lanes + at + v * size) : (vec){0};                       \
                }                                                                                                     \
            }                                                                                                         \
            for (int64_t k = 0; k < n; k++) {                                                                         \
                const float *from = b + k * lanes + at;                                                               \
                UNROLL for (int i = 0; i < rows; i++) {                                                               \
                    const float factor = a[i * stride + k];                                                           \
                    UNROLL for (int v = 0; v < width; v++) sum[i][v] += factor * *(const vec *)(from + v * size);     \
                }                                                                                                     \
            }                                                                                                         \
            UNROLL for (int i = 0; i < rows; i++) {                                                                   \
                UNROLL for (int v = 0; v < width; v++) *(vec *)(c + i * lanes + at + v * size) = sum[i][v];           \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    INLINE void name##_tile(int rows, int64_t n, const float *a, int64_t stride, const float *b, float *c, int lanes, \
                            int add) {                                                                                \
        const int width = lanes / size < most ? lanes / size : most;                                                  \
        for (; rows >= 4; rows -= 4, a += 4 * stride, c += 4 * lanes)                                                 \
            name##_rows(4, n, a, stride, b, c, lanes, width, add);                                                    \
        for (; rows > 0; rows--, a += stride, c += lanes) name##_rows(1, n, a, stride, b, c, lanes, width, add);      \
    }                                                                                                                 \
    attribute static void name(int rows, int64_t n, const float *a, int64_t stride, const float *b, float *c,         \
                               int lanes, int add) {                                                                  \
        if (lanes == LANES)                                                                                           \
            name##_tile(rows, n, a, stride, b, c, LANES, add);                                                        \
        else                                                                                                          \
            name##_tile(rows, n, a, stride, b, c, FEW_LANES, add);                                                    \
    }

PRODUCT(product_256, WITH_AVX2, vec8, 8, 2)
PRODUCT(product_512, WITH_AVX512, vec16, 16, 4)

INLINE void product(int rows, int64_t n, const float *a, int64_t stride, const float *b, float *c, int lanes, int set,
                    int add) {
    (set == AVX512 ? product_512 : product_256)(rows, n, a, stride, b, c, lanes, add);
}

/* The same by AMX, 64 lanes; n and rows are rounded up to 32. `a` is bf16; b [n / 2, 64] holds bf16 of two rows each. */
#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define WITH_AMX __attribute__((target("amx-tile,amx-bf16,avx512f" WIDE)))

WITH_AMX static void product_amx(int rows, int64_t n, const uint16_t *a, int64_t stride, const uint32_t *b, float *c,
                                 int add) {
    const int64_t wide = 2 * stride, line = 4 * LANES; /* bytes from row to row */
    for (int i = 0; i < rows; i += 32) {
        for (int l = 0; l < LANES; l += 32) {
            float *corner = c + i * LANES + l, *below = corner + 16 * LANES;
            if (add) {
                _tile_loadd(0, corner, line);
                _tile_loadd(1, corner + 16, line);
                _tile_loadd(2, below, line);
                _tile_loadd(3, below + 16, line);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < n; k += 32) {
                _tile_loadd(4, a + i * stride + k, wide);
                _tile_loadd(5, a + (i + 16) * stride + k, wide);
                _tile_loadd(6, b + k / 2 * LANES + l, line);
                _tile_loadd(7, b + k / 2 * LANES + l + 16, line);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, corner, line);
            _tile_stored(1, corner + 16, line);
            _tile_stored(2, below, line);
            _tile_stored(3, below + 16, line);
        }
    }
}

/* Eight tiles of 16 rows of 64 bytes. Static: some compilers drop what is written to it just before. */
#define EIGHT(x) x, x, x, x, x, x, x, x
static const struct {
    uint8_t palette, start, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} SHAPE = {.palette = 1, .bytes = {EIGHT(64)}, .rows = {EIGHT(16)}};

WITH_AMX static void begin_amx(void) { _tile_loadconfig(&SHAPE); }

WITH_AMX static void end_amx(void) { _tile_release(); }

/* Whether the processor has the tiles and the system lets this process have them. */
static int amx_allowed(void) {
    enum { ASK = 0x1023, TILE_DATA = 18, TILES = 1 << 24, BF16 = 1 << 22 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILES) || !(d & BF16)) return 0;
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#else
INLINE void product_amx(int rows, int64_t n, const uint16_t *a, int64_t stride, const uint32_t *b, float *c, int add) {}
INLINE void begin_amx(void) {}
INLINE void end_amx(void) {}
INLINE int amx_allowed(void) { return 0; }
#endif

/* Rows of a tile of 64 lanes as bf16, two rows in a word; rows beyond `held` up to a multiple of 32 are zeros. */
INLINE uint32_t rounded_half(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u + 0x7fff + ((u >> 16) & 1);
}

INLINE void pair_rows(const float *x, int held, uint32_t *pairs) {
    for (int j = 0; j < held; j += 2) {
        uint32_t *row = pairs + j / 2 * LANES;
        for (int l = 0; l < LANES; l++) row[l] = rounded_half(x[j * LANES + l]) >> 16;
        if (j + 1 == held) break;
        for (int l = 0; l < LANES; l++) row[l] |= rounded_half(x[(j + 1) * LANES + l]) & 0xffff0000u;
    }
    for (int j = (held + 1) / 2; j < (held + 31) / 32 * 16; j++) memset(pairs + j * LANES, 0, LANES * 4);
}

/* The widest set of instructions that the processor has, at most this one; NONE where nothing here can run. */
static inline int widest_set(int most) {
    const int wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512dq");
    if (wide && most >= AMX && amx_allowed()) return AMX;
    const int have = wide ? AVX512 : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? AVX2 : NONE;
    return most < have ? most : have;
}
