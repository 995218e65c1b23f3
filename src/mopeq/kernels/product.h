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

#include "team.h"

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

/* A float rounded to bf16, which are the upper two bytes. */
INLINE uint32_t rounded_half(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u + 0x7fff + ((u >> 16) & 1);
}

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

#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define WITH_AMX __attribute__((target("amx-tile,amx-bf16,avx512f" WIDE)))

/* Eight tiles of 16 rows of 64 bytes. Static: some compilers drop what is written to it just before. */
#define EIGHT(x) x, x, x, x, x, x, x, x
static const struct {
    uint8_t palette, start, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} SHAPE = {.palette = 1, .bytes = {EIGHT(64)}, .rows = {EIGHT(16)}};

WITH_AMX static inline void begin_amx(void) { _tile_loadconfig(&SHAPE); }

WITH_AMX static inline void end_amx(void) { _tile_release(); }

/* Sums of 32 x 32 floats, `across` bytes from row to row, to tiles 0 to 3, where they go on, or begin at zero. */
INLINE WITH_AMX void open_corner(const float *c, int64_t across, int add) {
    const char *below = (const char *)c + 16 * across;
    if (add) {
        _tile_loadd(0, c, across);
        _tile_loadd(1, c + 16, across);
        _tile_loadd(2, below, across);
        _tile_loadd(3, below + 64, across);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}

INLINE WITH_AMX void close_corner(float *c, int64_t across) {
    char *below = (char *)c + 16 * across;
    _tile_stored(0, c, across);
    _tile_stored(1, c + 16, across);
    _tile_stored(2, below, across);
    _tile_stored(3, below + 64, across);
}

/* Whether the processor has the tiles, and rounds to bf16, and the system lets this process have them. */
static int amx_allowed(void) {
    enum { ASK = 0x1023, TILE_DATA = 18, TILES = 1 << 24, BF16 = 1 << 22, ROUNDS = 1 << 5 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILES) || !(d & BF16)) return 0;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & ROUNDS)) return 0;
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#else
INLINE void begin_amx(void) {}
INLINE void end_amx(void) {}
INLINE int amx_allowed(void) { return 0; }
#endif

/* The widest set of instructions that the processor has, at most this one; NONE where nothing here can run. */
static inline int widest_set(int most) {
    const int wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512dq");
    if (wide && most >= AMX && amx_allowed()) return AMX;
    const int have = wide ? AVX512 : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? AVX2 : NONE;
    return most < have ? most : have;
}
