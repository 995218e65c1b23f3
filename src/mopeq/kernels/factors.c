/* Moments made fit to work with, what quant/descent.py's `factored` says in torch: H = moments / mean, damped, and of H in
   the order of rounding M and v of H = M diag(v) M^T, M unit upper triangular.

   Backwards, from the last column in that order to the first, that is U^T U, U upper triangular (Cholesky's), and a row of
   M transposed is a row of U backwards. U is made 64 rows at a time, in tiles of 64 columns, by product.h; so the order of
   a sum follows from n alone. Each thread takes a matrix, or where these are fewer than threads, all take parts of one
   after another. For x86 with AVX2 or AVX-512; built at first use (build.py). */

#include <float.h>
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

/* A matrix at work: its mean and whether it is finite; U's tiles so far, [columns up to the diagonal, 64, 64], and of the
   block of 64 rows at hand what is above its diagonal, turned and negative [64, n], and that tile's inverse, turned. */
typedef struct {
    const Job *job;
    int64_t expert, block;
    float mean, *tiles, *above, *inverse;
    int32_t *back; /* its rows in the order of U */
    atomic_int *endless;
} Matrix;

/* Row `at` of an expert's matrix to `halves` (if there are any), after the last one the zeros beyond. */
INLINE void halve(const float *row, int64_t at, int64_t n, int64_t expert, uint16_t *halves) {
    if (!halves) return;
    const int64_t padded = (n + 31) / 32 * 32, stride = padded + PAD;
    uint16_t *half = halves + expert * padded * stride, *to = half + at * stride;
    for (int64_t j = 0; j < n; j++) to[j] = (uint16_t)(rounded_half(row[j]) >> 16);
    memset(to + n, 0, (padded - n) * 2);
    for (int64_t r = n; at == n - 1 && r < padded; r++) memset(half + r * stride, 0, padded * 2);
}

/* u [64, 64] to its upper Cholesky factor, zeros below, and that transposed and inverted; 0 where it has none. */
INLINE int factor_tile(float *u, float *inverse) {
    for (int i = 0; i < LANES; i++) {
        float *row = u + i * LANES;
        const float pivot = row[i], by = 1 / sqrtf(pivot);
        if (!(pivot > 0 && pivot <= FLT_MAX)) return 0;
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

INLINE int64_t blocks_of(const Job *f) { return (f->n + LANES - 1) / LANES; }

/* Columns j of U, its rows up to the diagonal in tiles. */
INLINE float *column_of(const Matrix *m, int64_t j) { return m->tiles + j * (j + 1) / 2 * TILE; }

/* Rows of H. */
INLINE int scale(const Matrix *m, int64_t share, int64_t shares) {
    const Job *f = m->job;
    const int64_t n = f->n, at = m->expert * n * n;
    int endless = 0;
    for (int64_t i = share; i < n; i += shares) {
        const float *from = f->moments + at + i * n;
        float *to = f->h + at + i * n;
        for (int64_t j = 0; j < n; j++) {
            to[j] = from[j] / m->mean;
            endless |= !(fabsf(from[j]) <= FLT_MAX);
        }
        to[i] += f->damping[m->expert];
        halve(to, i, n, m->expert, f->half_h);
    }
    if (endless) atomic_store(m->endless, 1);
    return DONE;
}

/* All of H where nothing is known: the identity. */
static void identity(const Job *f, int64_t expert) {
    const int64_t n = f->n;
    float *h = f->h + expert * n * n;
    memset(h, 0, n * n * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        h[i * n + i] = 1;
        halve(h + i * n, i, n, expert, f->half_h);
    }
}

/* A tile of U's rows before it is solved for. */
INLINE void open_tile(const Matrix *m, int64_t j, float *c, int set) {
    const int64_t n = m->job->n, b = m->block;
    gather(m->job->h + m->expert * n * n, m->back, n, b * LANES, j * LANES, c);
    product(LANES, b * LANES, m->above, blocks_of(m->job) * LANES, column_of(m, j), c, LANES, set, 1);
}

/* The block's tile on the diagonal; 1 where there is none. */
INLINE int diagonal(const Matrix *m, int set) {
    const int64_t b = m->block, across = blocks_of(m->job) * LANES;
    float *own = column_of(m, b);
    for (int64_t k = 0; k < b * LANES; k++)
        for (int i = 0; i < LANES; i++) m->above[i * across + k] = -own[k * LANES + i];
    open_tile(m, b, own + b * TILE, set);
    return !factor_tile(own + b * TILE, m->inverse);
}

/* The block's tiles beyond it. */
INLINE int beyond(const Matrix *m, int64_t share, int64_t shares, int set) {
    float c[TILE];
    for (int64_t j = m->block + 1 + share; j < blocks_of(m->job); j += shares) {
        open_tile(m, j, c, set);
        product(LANES, LANES, m->inverse, LANES, c, column_of(m, j) + m->block * TILE, LANES, set, 0);
    }
    return DONE;
}

/* Rows of M transposed, and v. */
INLINE int turn_back(const Matrix *m, int64_t share, int64_t shares) {
    const Job *f = m->job;
    const int64_t n = f->n;
    for (int64_t a = share; a < n; a += shares) {
        const int64_t i = n - 1 - a, own = i / LANES;
        const float root = column_of(m, own)[i * LANES + i % LANES];
        float *row = f->mt + (m->expert * n + a) * n;
        f->v[m->expert * n + a] = root * root;
        memset(row + a + 1, 0, (n - 1 - a) * sizeof(float));
        for (int64_t j = own; j < blocks_of(f); j++) { /* columns of U from the diagonal on are those of mt down to 0 */
            const float *from = column_of(m, j) + i * LANES;
            const int64_t first = j > own ? 0 : i % LANES, end = n - j * LANES < LANES ? n - j * LANES : LANES;
            for (int64_t l = first; l < end; l++) row[n - 1 - j * LANES - l] = from[l] / root;
        }
        halve(row, a, n, m->expert, f->half_mt);
    }
    return DONE;
}

/* The steps, in either set of instructions. */
typedef struct {
    Share scale, diagonal, beyond, turn_back;
} Steps;

#define STEPS(name, attribute, set)                                                                                   \
    attribute static int scale_##name(const void *m, int64_t share, int64_t shares) { return scale(m, share, shares); } \
    attribute static int diagonal_##name(const void *m, int64_t share, int64_t shares) { return diagonal(m, set); }   \
    attribute static int beyond_##name(const void *m, int64_t share, int64_t shares) {                                \
        return beyond(m, share, shares, set);                                                                         \
    }                                                                                                                 \
    attribute static int turn_back_##name(const void *m, int64_t share, int64_t shares) {                             \
        return turn_back(m, share, shares);                                                                           \
    }                                                                                                                 \
    static const Steps name = {scale_##name, diagonal_##name, beyond_##name, turn_back_##name};

STEPS(avx2, WITH_AVX2, AVX2)
STEPS(avx512, WITH_AVX512, AVX512)

static int in_use = NONE;

/* One matrix, by so many threads. */
static int matrix(const Job *f, int64_t expert, int64_t threads) {
    const Steps *steps = in_use == AVX512 ? &avx512 : &avx2;
    const int64_t n = f->n, blocks = blocks_of(f), tiles = blocks * (blocks + 1) / 2;
    float *room = malloc((tiles * TILE + blocks * TILE + TILE + n) * sizeof(float));
    if (!room) return NO_MEMORY;
    float *above = room + tiles * TILE, *inverse = above + blocks * TILE;
    atomic_int endless = 0;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += f->moments[(expert * n + i) * n + i];
    Matrix m = {f, expert, 0, (float)(sum / n), room, above, inverse, (int32_t *)(inverse + TILE), &endless};
    for (int64_t i = 0; i < n; i++) m.back[i] = (int32_t)f->order[expert * n + n - 1 - i];
    if (m.mean > 0) in_shares(steps->scale, &m, threads);
    if (!(m.mean > 0) || endless) identity(f, expert);
    int failed = 0;
    for (; m.block < blocks && !failed; m.block++) {
        failed = steps->diagonal(&m, 0, 1);
        if (!failed) in_shares(steps->beyond, &m, threads);
    }
    if (!failed) in_shares(steps->turn_back, &m, threads);
    f->failed[expert] = failed;
    free(room);
    return DONE;
}

static int matrices(const void *job, int64_t share, int64_t shares) {
    const Job *f = job;
    int found = DONE;
    for (int64_t e = share; e < f->experts && found == DONE; e += shares) found = matrix(f, e, 1);
    return found;
}

/* Chooses at most this set of instructions (product.h) and returns it. */
int mopeq_factors_set(int most) { return in_use = widest_set(most < AVX512 ? most : AVX512); }

int mopeq_factors(const Job *f, int64_t threads) {
    int found = DONE;
    if (f->experts >= threads) return in_shares(matrices, f, threads);
    for (int64_t e = 0; e < f->experts && found == DONE; e++) found = matrix(f, e, threads);
    return found;
}
