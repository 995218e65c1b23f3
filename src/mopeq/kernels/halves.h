/* Products in float32's precision by AMX, which multiplies bf16: each factor goes as the sum of two bf16, its upper and its
   lower half, and of the four products all are taken but that of both lower ones, 2^-16 of a product. Where b has no lower
   half, as weights stored in bf16 have not, two are left.

   Of c [m, n] = a [m, k] b [k, n], a's rows lie as they are, b's columns 64 side by side, each word two of k. */

#pragma once

#include "product.h"

/* Element (i, j) of a factor lies at i * down + j * along. */
typedef struct {
    const float *at;
    int64_t down, along;
} Factor;

#ifdef WITH_AMX
#define WITH_HALVES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c" WIDE)))

/* What rounding 16 floats to bf16 leaves of each. */
INLINE WITH_HALVES __m512 rest_of(__m512 x) {
    return _mm512_sub_ps(x, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

/* 32 floats, of which those beyond `held` count as zeros, as 16 words of two bf16; or what that leaves of them. */
INLINE WITH_HALVES __m512i line_of(const float *from, int64_t held, int rest, __mmask16 *any) {
    const __mmask32 mask = held >= 32 ? ~0u : (1u << held) - 1;
    __m512 one = _mm512_maskz_loadu_ps((__mmask16)mask, from);
    __m512 two = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from + 16);
    const __m512 one_rest = rest_of(one), two_rest = rest_of(two);
    *any |= _mm512_test_epi32_mask((__m512i)one_rest, (__m512i)one_rest);
    *any |= _mm512_test_epi32_mask((__m512i)two_rest, (__m512i)two_rest);
    return (__m512i)(rest ? _mm512_cvtne2ps_pbh(two_rest, one_rest) : _mm512_cvtne2ps_pbh(two, one));
}

/* 16 words of each of 16 vectors, turned. */
INLINE WITH_HALVES void turn(__m512i v[16]) {
    __m512i w[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        v[i] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0xdd);
    }
}

/* A block of a factor, 16 lines (a's rows or b's columns, `line` apart) by 32 of k (`step` apart), of which `lines` and
   `held` are there and the others zeros: words of two bf16, next to each other in k. v[i] holds those of line i, or
   those of all lines at the i-th pair. `rest`: not of the floats, but of what rounding leaves of them; `any`: whether
   that is anything. */
INLINE WITH_HALVES void block_of(const float *at, int64_t line, int64_t step, int64_t lines, int64_t held, int by_line,
                                 int rest, __mmask16 *any, __m512i v[16]) {
    if (step == 1) {
        for (int i = 0; i < 16; i++) v[i] = i < lines ? line_of(at + i * line, held, rest, any) : _mm512_setzero_si512();
    } else {
        const __mmask16 mask = lines >= 16 ? 0xffff : (__mmask16)((1u << lines) - 1);
        for (int i = 0; i < 32; i++) {
            __m512 x = _mm512_maskz_loadu_ps(i < held ? mask : 0, at + i * step);
            const __m512 left = rest_of(x);
            *any |= _mm512_test_epi32_mask((__m512i)left, (__m512i)left);
            const __m512i half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest ? left : x));
            v[i / 2] = i % 2 ? _mm512_or_si512(v[i / 2], _mm512_slli_epi32(half, 16)) : half;
        }
    }
    if ((step == 1) != by_line) turn(v);
}

/* `depth` floats side by side as bf16, upper and lower halves, and zeros up to a multiple of 32. */
INLINE WITH_HALVES void halves_of(const float *from, int64_t depth, uint16_t *high, uint16_t *low) {
    for (int64_t j = 0; j < depth; j += 32) {
        const __mmask32 mask = depth - j >= 32 ? ~0u : (1u << (depth - j)) - 1;
        const __m512 one = _mm512_maskz_loadu_ps((__mmask16)mask, from + j);
        const __m512 two = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from + j + 16);
        _mm512_storeu_si512(high + j, (__m512i)_mm512_cvtne2ps_pbh(two, one));
        _mm512_storeu_si512(low + j, (__m512i)_mm512_cvtne2ps_pbh(rest_of(two), rest_of(one)));
    }
}

/* Rows of zeros after `held` ones, up to a multiple of 32. */
INLINE void no_rows(int64_t held, int64_t depth, uint16_t *high, uint16_t *low, int64_t stride) {
    for (int64_t r = held; r % 32; r++) {
        memset(high + r * stride, 0, (depth + 31) / 32 * 64);
        memset(low + r * stride, 0, (depth + 31) / 32 * 64);
    }
}

/* `held` rows of a by `depth` of k, from its element (first, from) on, as bf16 [rows up to a multiple of 32, stride]. */
INLINE WITH_HALVES void rows_of(const Factor *a, int64_t first, int64_t held, int64_t from, int64_t depth, uint16_t *high,
                                uint16_t *low, int64_t stride) {
    __mmask16 any = 0;
    __m512i v[16];
    no_rows(held, depth, high, low, stride);
    if (a->along == 1) {
        const float *at = a->at + first * a->down + from;
        for (int64_t r = 0; r < held; r++) halves_of(at + r * a->down, depth, high + r * stride, low + r * stride);
        return;
    }
    for (int64_t j = 0; j < depth; j += 32) {
        for (int64_t r = 0; r < held; r += 16) {
            const float *at = a->at + (first + r) * a->down + (from + j) * a->along;
            for (int rest = 0; rest < 2; rest++) {
                block_of(at, a->down, a->along, held - r, depth - j, 1, rest, &any, v);
                uint16_t *to = (rest ? low : high) + r * stride + j;
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * stride, v[i]);
            }
        }
    }
}

/* Asks for what is read next, 32 rows of 64 floats or what there is of them: no processor foresees rows pages apart. */
INLINE void ahead_of(const float *at, int64_t down, int64_t held, int64_t depth) {
    for (int64_t i = 0; i < 32 && i < depth; i++)
        for (int64_t l = 0; l < held; l += 16) _mm_prefetch((const char *)(at + i * down + l), _MM_HINT_T0);
}

/* `held` columns of b, at most 64, by `depth` of k, from its element (from, first) on: words [depth / 2, 64]. Returns
   whether anything is in `low`, which else is left as it was. */
INLINE WITH_HALVES int columns_of(const Factor *b, int64_t first, int64_t held, int64_t from, int64_t depth, uint32_t *high,
                                  uint32_t *low) {
    __mmask16 any = 0;
    __m512i v[16];
    const int64_t wide = b->along == 1 ? LANES : 16; /* rows of b are read on for all lanes, columns for 16 */
    for (int rest = 0; rest < 2; rest++) {
        if (rest && !any) return 0;
        for (int64_t some = 0; some < LANES; some += wide) {
            for (int64_t j = 0; j < depth; j += 32) {
                const float *at = b->at + first * b->along + (from + j) * b->down;
                if (b->along == 1) ahead_of(at + 32 * b->down, b->down, held, depth - j - 32);
                for (int64_t l = some; l < some + wide; l += 16) {
                    const int64_t lanes = held - l < 0 ? 0 : held - l;
                    block_of(at + l * b->along, b->along, b->down, lanes, depth - j, 0, rest, &any, v);
                    uint32_t *to = (rest ? low : high) + j / 2 * LANES + l;
                    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * LANES, v[i]);
                }
            }
        }
    }
    return 1;
}

/* c [32, 32] (+)= a's two halves times b's upper and, where there is one, a's upper times b's lower one. */
INLINE WITH_HALVES void corner(int64_t depth, const uint16_t *a_high, const uint16_t *a_low, int64_t stride,
                               const uint32_t *b_high, const uint32_t *b_low, int both, float *c, int64_t apart, int add) {
    const int64_t wide = 2 * stride, line = 4 * LANES, across = 4 * apart;
    open_corner(c, across, add);
    for (int64_t k = 0; k < depth; k += 32) {
        const uint32_t *b = b_high + k / 2 * LANES;
        _tile_loadd(6, b, line);
        _tile_loadd(7, b + 16, line);
        _tile_loadd(4, a_low + k, wide);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a_low + 16 * stride + k, wide);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(4, a_high + k, wide);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a_high + 16 * stride + k, wide);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (!both) continue;
        b = b_low + k / 2 * LANES;
        _tile_loadd(6, b, line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, b + 16, line);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    close_corner(c, across);
}
#endif
