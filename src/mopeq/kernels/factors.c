/* Moments made fit to work with, what quant/descent.py's `factored` says in torch: H = moments / mean, damped, and of H in
   the order of rounding M and v of H = M diag(v) M^T, M unit upper triangular.

   Backwards, from the last column in that order to the first, that is U^T U, U upper triangular (Cholesky's), and a row of
   M transposed is a row of U backwards. U is made 64 rows at a time, in tiles of 64 columns, by product.h; so the order of
   a sum follows from n alone. For x86 with AVX2 or AVX-512; built at first use (build.py). */

#include <math.h>
#include <stdlib.h>

#include "product.h"

enum { TILE = LANES * LANES };

/* Matrices one after another in memory. Moments of nothing, or not finite, count as zeros, and are damped by one. Where
   H is not positive definite `failed` is 1, and mt, v and half_mt hold nothing. */
typedef struct {
    const float *moments;       /* [experts, n, n] */
    const int64_t *order;       /* [experts, n] */
    const float *damping;       /* [experts] */
    int64_t experts, n;
    float *h, *mt, *v;          /* [experts, n, n] twice, [experts, n] */
    uint16_t *half_h, *half_mt; /* both in bf16 [experts, padded, padded + PAD], zeros beyond n; or none */
    int32_t *failed;            /* [experts] */
} Job;

/* Row `at` of n in float32 to one of a matrix in bf16, and after the last one the zeros beyond. */
INLINE void halve(const float *row, int64_t at, int64_t n, uint16_t *half) {
    const int64_t padded = (n + 31) / 32 * 32, stride = padded + PAD;
    uint16_t *to = half + at * stride;
    for (int64_t j = 0; j < n; j++) {
        uint32_t u;
        memcpy(&u, row + j, 4);
        to[j] = (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
    memset(to + n, 0, (padded - n) * 2);
    for (int64_t r = n; at == n - 1 && r < padded; r++) memset(half + r * stride, 0, padded * 2);
}

/* H of one matrix. */
INLINE void scale(const float *moments, int64_t n, float damping, float *h, uint16_t *half) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += moments[i * n + i];
    const float mean = (float)(sum / n);
    int seen = mean > 0;
    for (int64_t i = 0; seen && i < n * n; i += n) {
        int wrong = 0;
        for (int64_t j = 0; j < n; j++) {
            h[i + j] = moments[i + j] / mean;
            wrong |= !(fabsf(moments[i + j]) <= 3.40282347e38f);
        }
        seen = !wrong;
    }
    if (!seen) memset(h, 0, n * n * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        h[i * n + i] += seen ? damping : 1.0f;
        if (half) halve(h + i * n, i, n, half);
    }
}

/* u [64, 64] to its upper Cholesky factor, zeros below, and that transposed and inverted; 0 where it has none. */
INLINE int factor_tile(float *u, float *inverse) {
    for (int i = 0; i < LANES; i++) {
        float *row = u + i * LANES;
        const float pivot = row[i], by = 1 / sqrtf(pivot);
        if (!(pivot > 0 && pivot <= 3.40282347e38f)) return 0;
        for (int l = 0; l < LANES; l++) row[l] = l < i ? 0.0f : row[l] * by;
        for (int k = i + 1; k < LANES; k++)
            for (int l = 0; l < LANES; l++) u[k * LANES + l] -= row[k] * row[l];
    }
    for (int i = 0; i < LANES; i++) {
        float sum[LANES] = {0};
        sum[i] = 1;
        for (int k = 0; k < i; k++)
            for (int l = 0; l < LANES; l++) sum[l] -= u[k * LANES + i] * inverse[k * LANES + l];
        for (int l = 0; l < LANES; l++) inverse[i * LANES + l] = sum[l] / u[i * LANES + i];
    }
    return 1;
}

/* 64 rows by 64 columns of H backwards, as of the identity beyond n; `back` are its rows, last first. */
INLINE void gather(const float *h, const int32_t *back, int64_t n, int64_t row, int64_t column, float *c) {
    for (int64_t i = row; i < row + LANES; i++, c += LANES) {
        for (int64_t l = 0; l < LANES; l++) c[l] = i == column + l;
        const int64_t held = i >= n ? 0 : n - column < LANES ? n - column : LANES;
        for (int64_t l = 0; l < held; l++) c[l] = h[(int64_t)back[i] * n + back[column + l]];
    }
}

/* Room for U's tiles, [columns up to the diagonal, 64, 64], and for what a step works with. */
INLINE int64_t room_of(int64_t n) {
    const int64_t blocks = (n + LANES - 1) / LANES;
    return blocks * (blocks + 1) / 2 * TILE + blocks * TILE + 2 * TILE + blocks * LANES;
}

/* M transposed and v of one matrix; 0 where H is not positive definite. */
INLINE int factor(const float *h, const int64_t *order, int64_t n, float *mt, float *v, uint16_t *half, float *room,
                  int set) {
    const int64_t blocks = (n + LANES - 1) / LANES, across = blocks * LANES;
    float *above = room + blocks * (blocks + 1) / 2 * TILE, *c = above + blocks * TILE, *inverse = c + TILE;
    int32_t *back = (int32_t *)(inverse + TILE);
    for (int64_t i = 0; i < n; i++) back[i] = (int32_t)order[n - 1 - i];
    for (int64_t b = 0; b < blocks; b++) {
        float *own = room + b * (b + 1) / 2 * TILE;
        for (int64_t k = 0; k < b * LANES; k++)
            for (int i = 0; i < LANES; i++) above[i * across + k] = -own[k * LANES + i];
        for (int64_t j = b; j < blocks; j++) {
            float *tile = room + j * (j + 1) / 2 * TILE;
            gather(h, back, n, b * LANES, j * LANES, c);
            product(LANES, b * LANES, above, across, tile, c, LANES, set, 1);
            if (j > b) {
                product(LANES, LANES, inverse, LANES, c, tile + b * TILE, LANES, set, 0);
                continue;
            }
            if (!factor_tile(c, inverse)) return 0;
            memcpy(tile + b * TILE, c, TILE * sizeof(float));
        }
    }
    for (int64_t a = 0; a < n; a++) {
        const int64_t i = n - 1 - a, own = i / LANES;
        const float root = room[(own * (own + 1) / 2 * LANES + i) * LANES + i % LANES];
        float *row = mt + a * n;
        v[a] = root * root;
        memset(row + a + 1, 0, (n - 1 - a) * sizeof(float));
        for (int64_t j = own; j < blocks; j++) { /* columns of U from the diagonal on are those of mt down to 0 */
            const float *from = room + (j * (j + 1) / 2 * LANES + i) * LANES;
            const int64_t first = j > own ? 0 : i % LANES, end = n - j * LANES < LANES ? n - j * LANES : LANES;
            for (int64_t l = first; l < end; l++) row[n - 1 - j * LANES - l] = from[l] / root;
        }
        if (half) halve(row, a, n, half);
    }
    return 1;
}

INLINE int matrices(const Job *f, int64_t share, int64_t shares, int set) {
    const int64_t n = f->n, padded = (n + 31) / 32 * 32, each = padded * (padded + PAD);
    float *room = malloc(room_of(n) * sizeof(float));
    if (!room) return NO_MEMORY;
    for (int64_t e = share; e < f->experts; e += shares) {
        uint16_t *half_h = f->half_h ? f->half_h + e * each : 0, *half_mt = f->half_mt ? f->half_mt + e * each : 0;
        float *h = f->h + e * n * n, *mt = f->mt + e * n * n;
        scale(f->moments + e * n * n, n, f->damping[e], h, half_h);
        f->failed[e] = !factor(h, f->order + e * n, n, mt, f->v + e * n, half_mt, room, set);
    }
    free(room);
    return DONE;
}

WITH_AVX2 static int matrices_avx2(const void *job, int64_t share, int64_t shares) {
    return matrices(job, share, shares, AVX2);
}

WITH_AVX512 static int matrices_512(const void *job, int64_t share, int64_t shares) {
    return matrices(job, share, shares, AVX512);
}

static int in_use = NONE;

/* Chooses at most this set of instructions (product.h) and returns it. */
int mopeq_factors_set(int most) { return in_use = widest_set(most < AVX512 ? most : AVX512); }

/* Each thread takes a matrix, and others after it. */
int mopeq_factors(const Job *f, int64_t threads) {
    return in_shares(in_use == AVX512 ? matrices_512 : matrices_avx2, f, threads);
}
