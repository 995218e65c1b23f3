/* What candidates of a matrix would change in the loss, token by token: sum_o g_to (dW x_t)_o of each, dW = Q - W, as
   sense/quadratic.py says in torch. Outputs are taken 64 at a time: of them a candidate's dW is made from its codes once,
   and multiplied with 64 tokens after another; so dW is never held whole. Partial sums of each 64 outputs are added up in
   their order, so the number of threads changes nothing.

   For AVX-512 (with AVX2 torch's products are faster) and AMX, with which both factors go as sums of two bf16, three
   products of which are taken: what is left out is 2^-16 of a product. */

#include <stdlib.h>

#include "product.h"

/* A candidate: uint8 codes [out, n]; scales and zero points [out, groups]. */
typedef struct {
    const uint8_t *codes;
    const float *scale, *zero;
    int64_t group;
} Candidate;

typedef struct {
    const float *x, *g, *w; /* [tokens, n], [tokens, out], [out, n] */
    const Candidate *candidates;
    int64_t tokens, n, out, count;
    float *along; /* [blocks of 64 outputs, count, tokens up to a multiple of 64] */
} Job;

/* The word that holds a float's 16 upper bits as its lower ones, the rest taken away from the float. */
INLINE uint32_t take_half(float *x) {
    const uint32_t high = rounded_half(*x) & 0xffff0000u;
    float value;
    memcpy(&value, &high, 4);
    *x -= value;
    return high >> 16;
}

/* Tokens from `first` on as columns of a tile: floats [n, 64]; for AMX words [wide / 2, 64] of the upper and, behind them,
   of the lower halves. Columns and rows beyond are zeros. */
INLINE void turn(const Job *f, int64_t first, int64_t wide, void *tile, int set) {
    const int64_t held = f->tokens - first < LANES ? f->tokens - first : LANES, n = f->n;
    memset(tile, 0, (set == AMX ? 2 * wide : n) * LANES * (set == AMX ? 2 : 4));
    for (int64_t t = 0; t < held; t++) {
        const float *x = f->x + (first + t) * n;
        if (set != AMX) {
            for (int64_t j = 0; j < n; j++) ((float *)tile)[j * LANES + t] = x[j];
            continue;
        }
        uint32_t *high = (uint32_t *)tile + t, *low = high + wide / 2 * LANES;
        for (int64_t j = 0; j < n; j += 2) {
            float a = x[j], b = j + 1 < n ? x[j + 1] : 0;
            const uint32_t a_high = take_half(&a), b_high = take_half(&b);
            high[j / 2 * LANES] = a_high | b_high << 16;
            low[j / 2 * LANES] = take_half(&a) | take_half(&b) << 16;
        }
    }
}

/* Some rows of a candidate's dW: floats [rows, n]; for AMX upper halves [64, wide + PAD] and, behind them, lower ones. */
INLINE void away(const Job *f, const Candidate *q, int64_t first, int64_t rows, int64_t wide, float *line, void *made,
                 int set) {
    const int64_t n = f->n, groups = (n + q->group - 1) / q->group, stride = wide + PAD;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *codes = q->codes + (first + r) * n;
        const float *w = f->w + (first + r) * n;
        float *to = set == AMX ? line : (float *)made + r * n;
        for (int64_t i = 0; i < groups; i++) {
            const float s = q->scale[(first + r) * groups + i], z = q->zero[(first + r) * groups + i];
            const int64_t end = (i + 1) * q->group < n ? (i + 1) * q->group : n;
            for (int64_t j = i * q->group; j < end; j++) to[j] = ((float)codes[j] - z) * s - w[j];
        }
        if (set != AMX) continue;
        uint16_t *high = (uint16_t *)made + r * stride, *low = high + LANES * stride;
        for (int64_t j = 0; j < n; j++) high[j] = (uint16_t)take_half(to + j);
        for (int64_t j = 0; j < n; j++) low[j] = (uint16_t)take_half(to + j);
        for (int64_t j = n; j < wide; j++) high[j] = low[j] = 0;
    }
}

INLINE int blocks(const Job *f, int64_t thread, int64_t threads, int set) {
    const int64_t n = f->n, wide = (n + 31) / 32 * 32, padded = (f->tokens + LANES - 1) / LANES * LANES;
    const int64_t tile = set == AMX ? wide * LANES : n * LANES, stride = wide + PAD; /* words of 4 bytes */
    const int64_t own = set == AMX ? LANES * stride : LANES * n;
    float *turned = malloc((padded / LANES * tile + own + n + LANES * LANES + LANES * padded) * sizeof(float));
    if (!turned) return NO_MEMORY;
    float *made = turned + padded / LANES * tile, *line = made + own, *c = line + n, *g = c + LANES * LANES;
    for (int64_t t = 0; t < padded; t += LANES) turn(f, t, wide, turned + t / LANES * tile, set);
    for (int64_t first = thread * LANES; first < f->out; first += threads * LANES) {
        const int64_t rows = f->out - first < LANES ? f->out - first : LANES;
        for (int64_t t = 0; t < padded; t++) { /* [padded / 64, 64 outputs, 64 tokens], zeros beyond */
            float *to = g + t / LANES * LANES * LANES + t % LANES;
            for (int64_t r = 0; r < rows; r++) to[r * LANES] = t < f->tokens ? f->g[t * f->out + first + r] : 0;
        }
        for (int64_t i = 0; i < f->count; i++) {
            float *along = f->along + (first / LANES * f->count + i) * padded;
            away(f, f->candidates + i, first, rows, wide, line, made, set);
            for (int64_t t = 0; t < padded; t += LANES, along += LANES) {
                const float *b = turned + t / LANES * tile;
                if (set == AMX) {
                    const uint16_t *high = (const uint16_t *)made, *low = high + LANES * stride;
                    const uint32_t *x_high = (const uint32_t *)b, *x_low = x_high + wide / 2 * LANES;
                    product_amx((int)rows, wide, high, stride, x_high, c, 0);
                    product_amx((int)rows, wide, high, stride, x_low, c, 1);
                    product_amx((int)rows, wide, low, stride, x_high, c, 1);
                } else {
                    product((int)rows, n, made, n, b, c, LANES, set, 0);
                }
                float sum[LANES] = {0};
                for (int64_t r = 0; r < rows; r++) {
                    const float *by = g + t * LANES + r * LANES, *row = c + r * LANES;
                    for (int l = 0; l < LANES; l++) sum[l] += by[l] * row[l];
                }
                memcpy(along, sum, sizeof sum);
            }
        }
    }
    free(turned);
    return DONE;
}

WITH_AVX512 static int blocks_512(const Job *f, int64_t thread, int64_t threads) {
    return blocks(f, thread, threads, AVX512);
}
WITH_AVX512 static int blocks_amx(const Job *f, int64_t thread, int64_t threads) {
    begin_amx();
    const int found = blocks(f, thread, threads, AMX);
    end_amx();
    return found;
}

static int in_use = NONE;

/* Chooses at most this set of instructions (product.h) and returns it; NONE where it is less than AVX-512. */
int mopeq_forms_set(int most) {
    const int have = widest_set(most);
    return in_use = have >= AVX512 ? have : NONE;
}

/* Does a thread's share of a job: every threads-th 64 outputs. */
int mopeq_forms(const Job *f, int64_t thread, int64_t threads) {
    return (in_use == AMX ? blocks_amx : blocks_512)(f, thread, threads);
}
