/* What candidates of a matrix would change in the loss, token by token: sum_o g_to (dW x_t)_o of each, dW = Q - W, as
   sense/quadratic.py says in torch. Outputs are taken 64 at a time: of them a candidate's dW is made from its codes once,
   and multiplied with 64 tokens after another; so dW is never held whole. Partial sums of each 64 outputs are added up in
   their order, so the number of threads changes nothing.

   For AVX-512 (with AVX2 torch's products are faster) and AMX, by halves.h. */

#include <stdlib.h>

#include "halves.h"

/* A candidate: codes [out, n]; scales in fp16 and zero points [out, groups], these `middle` where there are none. */
typedef struct {
    const uint8_t *codes;
    const uint16_t *scale;
    const uint8_t *zero;
    int64_t group;
    float middle;
} Candidate;

typedef struct {
    const float *x, *g, *w; /* [tokens, n], [tokens, out], [out, n] */
    const Candidate *candidates;
    int64_t tokens, n, out, count;
    float *along; /* [blocks of 64 outputs, count, tokens up to a multiple of 64] */
} Job;

/* Some rows of a candidate's dW [rows, n]. */
INLINE WITH_AVX512 void away(const Job *f, const Candidate *q, int64_t first, int64_t rows, float *made) {
    const int64_t n = f->n, groups = (n + q->group - 1) / q->group;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *codes = q->codes + (first + r) * n;
        const float *w = f->w + (first + r) * n;
        float *to = made + r * n;
        for (int64_t i = 0; i < groups; i++) {
            const int64_t at = (first + r) * groups + i;
            const float s = _cvtsh_ss(q->scale[at]), z = q->zero ? (float)q->zero[at] : q->middle;
            const int64_t end = (i + 1) * q->group < n ? (i + 1) * q->group : n;
            for (int64_t j = i * q->group; j < end; j++) to[j] = ((float)codes[j] - z) * s - w[j];
        }
    }
}

/* What 64 tokens have along g, from dW x [64 outputs, 64 tokens] and g turned like it. */
INLINE void sum_along(int64_t rows, const float *g, const float *c, float *along) {
    float sum[LANES] = {0};
    for (int64_t r = 0; r < rows; r++)
        for (int l = 0; l < LANES; l++) sum[l] += g[r * LANES + l] * c[r * LANES + l];
    memcpy(along, sum, sizeof sum);
}

/* 64 outputs' gradients [tokens / 64, 64 outputs, 64 tokens], zeros beyond. */
INLINE void turn_gradients(const Job *f, int64_t first, int64_t rows, int64_t padded, float *g) {
    for (int64_t t = 0; t < padded; t++) {
        float *to = g + t / LANES * LANES * LANES + t % LANES;
        for (int64_t r = 0; r < rows; r++) to[r * LANES] = t < f->tokens ? f->g[t * f->out + first + r] : 0;
    }
}

INLINE int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }

WITH_AVX512 static int blocks_512(const void *job, int64_t share, int64_t shares) {
    const Job *f = job;
    const int64_t n = f->n, padded = (f->tokens + LANES - 1) / LANES * LANES;
    float *turned = malloc((n * padded + LANES * n + LANES * LANES + LANES * padded) * sizeof(float));
    if (!turned) return NO_MEMORY;
    float *made = turned + n * padded, *c = made + LANES * n, *g = c + LANES * LANES;
    for (int64_t t = 0; t < padded; t++) /* [tokens / 64, n, 64 tokens], zeros beyond */
        for (int64_t j = 0; j < n; j++)
            turned[t / LANES * n * LANES + j * LANES + t % LANES] = t < f->tokens ? f->x[t * n + j] : 0;
    for (int64_t first = share * LANES; first < f->out; first += shares * LANES) {
        const int64_t rows = less(f->out - first, LANES);
        turn_gradients(f, first, rows, padded, g);
        for (int64_t i = 0; i < f->count; i++) {
            float *along = f->along + (first / LANES * f->count + i) * padded;
            away(f, f->candidates + i, first, rows, made);
            for (int64_t t = 0; t < padded; t += LANES) {
                product((int)rows, n, made, n, turned + t * n, c, LANES, AVX512, 0);
                sum_along(rows, g + t * LANES, c, along + t);
            }
        }
    }
    free(turned);
    return DONE;
}

#ifdef WITH_AMX
/* As turn_gradients, 16 by 16. */
INLINE WITH_HALVES void turn_gradients_amx(const Job *f, int64_t first, int64_t rows, int64_t padded, float *g) {
    __m512i v[16];
    for (int64_t t = 0; t < padded; t += 16) {
        float *to = g + t / LANES * LANES * LANES + t % LANES;
        for (int64_t r = 0; r < rows; r += 16) {
            const __mmask16 held = rows - r >= 16 ? 0xffff : (__mmask16)((1u << (rows - r)) - 1);
            for (int i = 0; i < 16; i++)
                v[i] = _mm512_maskz_loadu_epi32(t + i < f->tokens ? held : 0, f->g + (t + i) * f->out + first + r);
            turn(v);
            for (int i = 0; i < 16 && r + i < rows; i++) _mm512_storeu_si512(to + (r + i) * LANES, v[i]);
        }
    }
}

/* All candidates' dW of 64 outputs are made at a time, so that tokens, which the second cache has no room for, pass but
   once for each. */
WITH_HALVES static int blocks_amx(const void *job, int64_t share, int64_t shares) {
    const Job *f = job;
    const int64_t n = f->n, deep = (n + 31) / 32 * 32, stride = deep + PAD, tile = deep * LANES, half = LANES * stride;
    const int64_t padded = (f->tokens + LANES - 1) / LANES * LANES;
    void *room = NULL;
    if (posix_memalign(&room, 64, (deep * padded + deep + LANES * (LANES + padded) + f->count * half) * sizeof(float)))
        return NO_MEMORY;
    uint32_t *turned = room; /* [tokens / 64, upper and lower, deep / 2, 64 tokens] */
    float *made = (float *)(turned + deep * padded), *c = made + deep, *g = c + LANES * LANES;
    uint16_t *aways = (uint16_t *)(g + LANES * padded); /* [candidates, upper and lower, 64 outputs, stride] */
    const Factor x = {f->x, 1, n};
    for (int64_t t = 0; t < padded; t += LANES) {
        uint32_t *to = turned + t / LANES * tile;
        if (!columns_of(&x, t, less(f->tokens - t, LANES), 0, n, to, to + tile / 2)) memset(to + tile / 2, 0, tile * 2);
    }
    begin_amx();
    for (int64_t first = share * LANES; first < f->out; first += shares * LANES) {
        const int64_t rows = less(f->out - first, LANES);
        turn_gradients_amx(f, first, rows, padded, g);
        for (int64_t i = 0; i < f->count; i++) {
            uint16_t *high = aways + 2 * i * half;
            for (int64_t r = 0; r < rows; r++) {
                away(f, f->candidates + i, first + r, 1, made);
                halves_of(made, n, high + r * stride, high + half + r * stride);
            }
            no_rows(rows, n, high, high + half, stride);
        }
        for (int64_t t = 0; t < padded; t += LANES) {
            const uint32_t *b = turned + t / LANES * tile;
            const int64_t tokens = less(f->tokens - t, LANES);
            for (int64_t i = 0; i < f->count; i++) {
                const uint16_t *high = aways + 2 * i * half;
                for (int64_t r = 0; r < rows; r += 32)
                    for (int64_t l = 0; l < tokens; l += 32)
                        corner(n, high + r * stride, high + half + r * stride, stride, b + l, b + tile / 2 + l, 1,
                               c + r * LANES + l, LANES, 0);
                sum_along(rows, g + t * LANES, c, f->along + (first / LANES * f->count + i) * padded + t);
            }
        }
    }
    end_amx();
    free(room);
    return DONE;
}
#else
static int blocks_amx(const void *job, int64_t share, int64_t shares) { return blocks_512(job, share, shares); }
#endif

static int in_use = NONE;

/* Chooses at most this set of instructions (product.h) and returns it; NONE where it is less than AVX-512. */
int mopeq_forms_set(int most) {
    const int have = widest_set(most);
    return in_use = have >= AVX512 ? have : NONE;
}

/* Each thread takes 64 outputs, and others after them. */
int mopeq_forms(const Job *f, int64_t threads) { return in_shares(in_use == AMX ? blocks_amx : blocks_512, f, threads); }
