/* c [m, n] (+)= a [m, k] b [k, n], as halves.h multiplies; `upper`: at least on and above the diagonal.

   What is worked on at a time, 512 rows of a by 512 of k and 64 columns of b by as many, stays in the cache. Each thread
   has columns of its own, and the order of a sum follows from k alone. */

#include <stdlib.h>

#include "halves.h"

enum { ROWS = 512, DEEP = 512 };

typedef struct {
    Factor a, b;
    float *c; /* rows `apart` apart */
    int64_t m, k, n, apart, add, upper;
} Job;

#ifdef WITH_AMX
/* A share of a job: every shares-th 64 columns. */
WITH_HALVES static int columns(const void *job, int64_t share, int64_t shares) {
    const Job *f = job;
    const int64_t stride = DEEP + PAD;
    void *room = NULL;
    if (posix_memalign(&room, 64, (ROWS * stride + DEEP * LANES + LANES * LANES) * 4)) return NO_MEMORY;
    uint16_t *a_high = room, *a_low = a_high + ROWS * stride;
    uint32_t *b_high = (uint32_t *)(a_low + ROWS * stride), *b_low = b_high + DEEP / 2 * LANES;
    float *few = (float *)(b_low + DEEP / 2 * LANES);
    begin_amx();
    for (int64_t first = 0; first < f->m; first += ROWS) {
        const int64_t held = f->m - first < ROWS ? f->m - first : ROWS;
        for (int64_t from = 0; from < f->k; from += DEEP) {
            const int64_t depth = f->k - from < DEEP ? f->k - from : DEEP;
            const int add = f->add || from;
            rows_of(&f->a, first, held, from, depth, a_high, a_low, stride);
            for (int64_t lane = share * LANES; lane < f->n; lane += shares * LANES) {
                const int64_t lanes = f->n - lane < LANES ? f->n - lane : LANES;
                const int both = columns_of(&f->b, lane, lanes, from, depth, b_high, b_low);
                for (int64_t r = 0; r < held; r += 32) {
                    for (int64_t l = 0; l < lanes; l += 32) {
                        if (f->upper && first + r > lane + l) continue;
                        const int whole = r + 32 <= held && l + 32 <= lanes;
                        float *to = f->c + (first + r) * f->apart + lane + l;
                        corner(depth, a_high + r * stride, a_low + r * stride, stride, b_high + l, b_low + l, both,
                               whole ? to : few, whole ? f->apart : LANES, whole && add);
                        if (whole) continue;
                        for (int64_t x = 0; x < 32 && r + x < held; x++) {
                            float *sum = to + x * f->apart;
                            for (int64_t y = 0; y < 32 && l + y < lanes; y++)
                                sum[y] = few[x * LANES + y] + (add ? sum[y] : 0);
                        }
                    }
                }
            }
        }
    }
    end_amx();
    free(room);
    return DONE;
}
#else
static int columns(const void *job, int64_t share, int64_t shares) { return NO_MEMORY; }
#endif

/* AMX where the processor has it, else NONE. */
int mopeq_dense_set(int most) { return widest_set(most) == AMX ? AMX : NONE; }

int mopeq_dense(const Job *f, int64_t threads) { return in_shares(columns, f, threads); }
