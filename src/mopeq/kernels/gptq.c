/* Rounding with feedback and coordinate descent, what quant/gptq.py and quant/descent.py say in torch: there stand the
   formulas, here the same steps on a tile of a matrix's outputs while it is in the caches.

   Matrices are [inputs, outputs]. Outputs do not know of each other, so each is a lane of its own: the order of a lane's
   sums is the same whatever the vectors' width, the tile or the number of threads, and so are the codes (additions of
   products are fused, which both sets of instructions can). For x86 with AVX2 or AVX-512; built at first use (build.py).
   Elementwise loops are plain C that compilers turn into vectors.

   Where there are AMX tiles, the two products that nearly all the work is (of the errors of all groups with mt's rows, and
   with H's) take both factors in bf16 and sum in float32. A code then goes the other way where it lies as near to a tie
   as the sum's rounding, some 0.2 % of it. */

#include <math.h>
#include <stdlib.h>

#include "product.h"

enum { TRIED = 3, BLOCK = 16 }; /* scales a group is rounded with; columns */

/* Matrices, one after another in memory, and what is asked. `order` is where columns come in rounding; without it nothing
   is rounded with feedback, and level, scale and zero are what descent begins with. Where there is room for codes, these
   are made instead of levels. */
typedef struct {
    int32_t bits, symmetric, group, sweeps, clip_count, neighbour_count;
    float clips[16];      /* shares of the whole range that are tried */
    float neighbours[4];  /* factors of the scale, tried with the zero points beside the best */
    float factors[TRIED]; /* of the scale found, for rounding */
    int64_t experts, n, out;
    const float *w;            /* [experts, n, out] */
    const float *mt, *v;       /* [experts, n, n], [experts, n] */
    const int64_t *order;      /* [experts, n] */
    const float *h;            /* [experts, n, n] */
    const uint16_t *half_mt, *half_h; /* these in bf16 [experts, padded, padded + PAD], zeros beyond n; or none */
    float *level;              /* [experts, n, out] */
    float *scale, *zero;       /* [experts, groups, out] */
    uint8_t *codes;            /* [experts, out, n], or none */
} Job;

/* `held` outputs of an expert, beside each other in rows of `lanes` lanes. */
typedef struct {
    int64_t expert, first;
    int held;
    float *w, *level;    /* [n, lanes] */
    float *scale, *zero; /* [groups, lanes] */
} Tile;

/* An expert's rows of half_mt or half_h; `padded` is 0 where there are none. */
typedef struct {
    const uint16_t *rows;
    int64_t padded, stride;
} Half;

static inline Half half_of(const Job *f, const uint16_t *rows, int64_t expert) {
    if (!rows) return (Half){0};
    const int64_t padded = (f->n + 31) / 32 * 32, stride = padded + PAD;
    return (Half){rows + expert * padded * stride, padded, stride};
}

/* ------------------------------------------------------------------------------------------- products by AMX */

/* `product` by AMX, 64 lanes; n and rows are rounded up to 32. `a` is bf16; b [n / 2, 64] holds bf16 of two rows each. */
#ifdef WITH_AMX
WITH_AMX static void product_amx(int rows, int64_t n, const uint16_t *a, int64_t stride, const uint32_t *b, float *c,
                                 int add) {
    const int64_t wide = 2 * stride, line = 4 * LANES; /* bytes from row to row */
    for (int i = 0; i < rows; i += 32) {
        for (int l = 0; l < LANES; l += 32) {
            open_corner(c + i * LANES + l, line, add);
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
            close_corner(c + i * LANES + l, line);
        }
    }
}
#else
INLINE void product_amx(int rows, int64_t n, const uint16_t *a, int64_t stride, const uint32_t *b, float *c, int add) {}
#endif

/* Rows of a tile of 64 lanes as bf16, two rows in a word; rows beyond `held` up to a multiple of 32 are zeros. */
INLINE void pair_rows(const float *x, int held, uint32_t *pairs) {
    for (int j = 0; j < held; j += 2) {
        uint32_t *row = pairs + j / 2 * LANES;
        for (int l = 0; l < LANES; l++) row[l] = rounded_half(x[j * LANES + l]) >> 16;
        if (j + 1 == held) break;
        for (int l = 0; l < LANES; l++) row[l] |= rounded_half(x[(j + 1) * LANES + l]) & 0xffff0000u;
    }
    for (int j = (held + 1) / 2; j < (held + 31) / 32 * 16; j++) memset(pairs + j * LANES, 0, LANES * 4);
}

/* ---------------------------------------------------------------------------------------------------- lanes */

static const float SMALLEST = 0x1p-24f, NORMAL = 0x1p-14f, LARGEST = 65504.0f;

INLINE float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; } /* ties to even, |x| < 2^22 */
INLINE float at_least(float x, float low) { return x > low ? x : low; }
INLINE float at_most(float x, float high) { return x < high ? x : high; }
INLINE float level_of(float x, float low, float high) { return nearest(at_most(at_least(x, low), high)); }

/* rtn.stored_scale of a scale up to LARGEST: the nearest fp16, but the next above where fp16 is subnormal. */
INLINE float stored_scale(float scale) {
    const float steps = at_least(ceilf(at_most(scale, NORMAL) * 0x1p24f), 1.0f) * SMALLEST;
    uint32_t u;
    memcpy(&u, &scale, 4);
    u += 0xfff + ((u >> 13) & 1);
    u &= ~(uint32_t)0x1fff;
    float half;
    memcpy(&half, &u, 4);
    return scale < NORMAL ? steps : half;
}

/* Rows of a matrix in memory <-> rows of a tile; lanes beyond the matrix are zeros. */
INLINE void load(float *tile, const float *row, int held, int lanes) {
    if (held == lanes) {
        EACH_LANE tile[l] = row[l];
        return;
    }
    memcpy(tile, row, held * sizeof(float));
    for (int l = held; l < lanes; l++) tile[l] = 0;
}

INLINE void store(float *row, const float *tile, int held, int lanes) {
    if (held == lanes) {
        EACH_LANE row[l] = tile[l];
        return;
    }
    memcpy(row, tile, held * sizeof(float));
}

/* --------------------------------------------------------------------------------------------------- ranges */

/* rtn.scale_and_zero of ranges that fp16 can express. */
INLINE void scale_and_zero(const Job *f, float low, float high, float *scale, float *zero) {
    const float most = (float)((1 << f->bits) - 1), half = (float)(1 << (f->bits - 1));
    if (f->symmetric) {
        *scale = stored_scale(at_least(-low / half, high / at_least(half - 1, 1.0f)));
        *zero = half;
    } else {
        *scale = stored_scale((high - low) / most);
        *zero = level_of(-low / *scale, 0, most);
    }
}

/* gptq.rounding_loss of each lane. */
INLINE void rounding_loss(const Job *f, int columns, const float *x, const float *weight, const float *s,
                          const float *z, float *loss, int lanes) {
    const float most = (float)((1 << f->bits) - 1);
    float inverse[LANES], low[LANES], high[LANES], sum[LANES];
    EACH_LANE {
        inverse[l] = 1 / s[l];
        low[l] = -z[l];
        high[l] = most - z[l];
        sum[l] = 0;
    }
    for (int j = 0; j < columns; j++) {
        const float *row = x + j * lanes, by = weight[j];
        EACH_LANE {
            const float t = row[l] * inverse[l], away = level_of(t, low[l], high[l]) - t;
            sum[l] += by * (away * away);
        }
    }
    EACH_LANE loss[l] = sum[l] * s[l] * s[l];
}

/* Keeps the better of the best range so far and another. */
INLINE void attempt(const Job *f, int columns, const float *x, const float *weight, const float *s, const float *z,
                    float *scale, float *zero, float *least, int lanes) {
    float loss[LANES];
    rounding_loss(f, columns, x, weight, s, z, loss, lanes);
    EACH_LANE {
        const int better = loss[l] < least[l];
        scale[l] = better ? s[l] : scale[l];
        zero[l] = better ? z[l] : zero[l];
        least[l] = better ? loss[l] : least[l];
    }
}

/* gptq.searched_range of a group x [columns, lanes]. */
INLINE void searched_range(const Job *f, int columns, const float *x, const float *weight, float *scale, float *zero,
                           int lanes) {
    const float most = (float)((1 << f->bits) - 1);
    const float steps = f->symmetric ? at_least((float)((1 << (f->bits - 1)) - 1), 1.0f) : most;
    float low[LANES], high[LANES], least[LANES], s[LANES], z[LANES];
    EACH_LANE low[l] = high[l] = 0;
    for (int j = 0; j < columns; j++) {
        EACH_LANE {
            low[l] = at_most(x[j * lanes + l], low[l]);
            high[l] = at_least(x[j * lanes + l], high[l]);
        }
    }
    EACH_LANE { /* feedback might have left what fp16 can express */
        const float range = high[l] - low[l], room = 0.999f * LARGEST * steps;
        const float within = range > room ? room / range : 1.0f;
        low[l] *= within;
        high[l] *= within;
        scale_and_zero(f, low[l], high[l], scale + l, zero + l);
    }
    rounding_loss(f, columns, x, weight, scale, zero, least, lanes);
    for (int i = 0; i < f->clip_count; i++) {
        EACH_LANE scale_and_zero(f, low[l] * f->clips[i], high[l] * f->clips[i], s + l, z + l);
        attempt(f, columns, x, weight, s, z, scale, zero, least, lanes);
    }
    float base[LANES], middle[LANES];
    memcpy(base, scale, lanes * sizeof(float));
    memcpy(middle, zero, lanes * sizeof(float));
    for (int step = -1; step <= 1; step += 2) {
        for (int i = 0; i < f->neighbour_count; i++) {
            EACH_LANE {
                s[l] = stored_scale(at_most(base[l] * f->neighbours[i], LARGEST));
                z[l] = at_most(at_least(middle[l] + (float)step, 0), most);
            }
            attempt(f, columns, x, weight, s, z, scale, zero, least, lanes);
        }
    }
}

/* ------------------------------------------------------------------------------------ rounding with feedback */

/* gptq.round_group: rounds target [columns, lanes] under one scale. mt [columns, columns of the group], rows m_stride
   apart, is M transposed. */
INLINE void round_group(const Job *f, int columns, const float *target, const float *w, const float *mt,
                        int64_t m_stride, const float *v, const float *s, const float *z, float *level, float *wrong,
                        float *cost, int lanes, int set) {
    const float most = (float)((1 << f->bits) - 1);
    float inverse[LANES], low[LANES], high[LANES];
    EACH_LANE {
        inverse[l] = 1 / s[l];
        low[l] = -z[l];
        high[l] = most - z[l];
        cost[l] = 0;
    }
    for (int first = 0; first < columns; first += BLOCK) {
        const int count = columns - first < BLOCK ? columns - first : BLOCK;
        float aims[BLOCK * LANES];
        memcpy(aims, target + first * lanes, count * lanes * sizeof(float));
        product(count, first, mt + first * m_stride, m_stride, wrong, aims, lanes, set, 1);
        for (int i = 0; i < count; i++) {
            const int j = first + i;
            float *aim = aims + i * lanes, by = v[j];
            product(1, i, mt + j * m_stride + first, 0, wrong + first * lanes, aim, lanes, set, 1);
            EACH_LANE {
                const float x = level_of(aim[l] * inverse[l], low[l], high[l]), q = x * s[l];
                level[j * lanes + l] = x;
                wrong[j * lanes + l] = w[j * lanes + l] - q;
                cost[l] += by * ((q - aim[l]) * (q - aim[l]));
            }
        }
    }
}

/* gptq.feed_back of one tile: w and level are in the order of the file, mt and v in that of rounding. */
INLINE int feed_back(const Job *f, Tile t, int lanes, int set) {
    const int group = f->group;
    const int64_t n = f->n, *order = f->order + t.expert * n;
    const float *mt = f->mt + t.expert * n * n, *v = f->v + t.expert * n;
    const size_t part = (size_t)group * lanes, row = lanes * sizeof(float);
    const Half half = half_of(f, f->half_mt, t.expert);
    float *wrong = malloc((n + 2 * group) * row + 2 * TRIED * part * sizeof(float) + half.padded * row / 2);
    if (!wrong) return NO_MEMORY;
    float *own = wrong + n * lanes, *target = own + part, *levels = target + part, *wrongs = levels + TRIED * part;
    uint32_t *pairs = (uint32_t *)(wrongs + TRIED * part);
    for (int64_t start = 0; start < n; start += group) {
        const int columns = (int)(n - start < group ? n - start : group);
        for (int j = 0; j < columns; j++) memcpy(own + j * lanes, t.w + order[start + j] * lanes, row);
        memcpy(target, own, columns * row);
        if (half.padded)
            product_amx(columns, start, half.rows + start * half.stride, half.stride, pairs, target, 1);
        else
            product(columns, start, mt + start * n, n, wrong, target, lanes, set, 1);
        float found[LANES], z[LANES], s[TRIED][LANES], cost[TRIED][LANES];
        searched_range(f, columns, target, v + start, found, z, lanes);
        for (int i = 0; i < TRIED; i++) {
            EACH_LANE s[i][l] = stored_scale(at_most(found[l] * f->factors[i], LARGEST));
            round_group(f, columns, target, own, mt + start * n + start, n, v + start, s[i], z, levels + i * part,
                        wrongs + i * part, cost[i], lanes, set);
        }
        int32_t best[LANES];
        EACH_LANE {
            best[l] = cost[1][l] < cost[0][l];
            best[l] = cost[2][l] < cost[best[l]][l] ? 2 : best[l];
            found[l] = s[best[l]][l];
        }
        for (int j = 0; j < columns; j++) {
            float *x = t.level + order[start + j] * lanes, *kept = wrong + (start + j) * lanes;
            EACH_LANE {
                const float *x0 = levels + j * lanes + l, *w0 = wrongs + j * lanes + l;
                x[l] = best[l] == 0 ? x0[0] : best[l] == 1 ? x0[part] : x0[2 * part];
                kept[l] = best[l] == 0 ? w0[0] : best[l] == 1 ? w0[part] : w0[2 * part];
            }
        }
        if (half.padded) pair_rows(wrong + start * lanes, columns, pairs + start / 2 * LANES);
        const int64_t place = order[start] / group;
        memcpy(t.scale + place * lanes, found, row);
        memcpy(t.zero + place * lanes, z, row);
    }
    free(wrong);
    return DONE;
}

/* ---------------------------------------------------------------------------------------- coordinate descent */

/* descent.best_scale: s and pull follow in place; hx [columns, lanes] is scratch. */
INLINE void best_scale(int columns, const float *x, float *pull, const float *h, int64_t n, float *s, float *hx,
                       int lanes, int set) {
    float curve[LANES], slope[LANES], away[LANES];
    EACH_LANE curve[l] = slope[l] = 0;
    product(columns, columns, h, n, x, hx, lanes, set, 0);
    for (int j = 0; j < columns; j++) {
        EACH_LANE {
            curve[l] += x[j * lanes + l] * hx[j * lanes + l];
            slope[l] += x[j * lanes + l] * pull[j * lanes + l];
        }
    }
    EACH_LANE {
        const int known = curve[l] > 0;
        const float wanted = s[l] - slope[l] / (known ? curve[l] : 1.0f);
        const float found = stored_scale(at_most(at_least(wanted, SMALLEST), LARGEST));
        const float change = found - s[l], gain = 2 * slope[l] * change + curve[l] * (change * change);
        const int taken = known & (gain < 0);
        away[l] = taken ? change : 0.0f;
        s[l] = taken ? found : s[l];
    }
    for (int j = 0; j < columns; j++) {
        EACH_LANE pull[j * lanes + l] += hx[j * lanes + l] * away[l];
    }
}

/* descent.move_codes: x and pull follow in place. h are the group's rows and columns of H, n apart. */
INLINE void move_codes(const Job *f, int columns, float *x, float *pull, const float *h, int64_t n, const float *s,
                       const float *z, int lanes, int set) {
    const float most = (float)((1 << f->bits) - 1);
    float step[LANES], low[LANES], high[LANES], moved[BLOCK * LANES];
    EACH_LANE {
        step[l] = 1 / s[l];
        low[l] = -z[l];
        high[l] = most - z[l];
    }
    for (int first = 0; first < columns; first += BLOCK) {
        const int count = columns - first < BLOCK ? columns - first : BLOCK;
        for (int i = 0; i < count; i++) {
            const int j = first + i;
            float pulled[LANES], *level = x + j * lanes;
            const float inverse = 1 / h[j * n + j];
            memcpy(pulled, pull + j * lanes, lanes * sizeof(float));
            product(1, i, h + j * n + first, 0, moved, pulled, lanes, set, 1);
            EACH_LANE {
                const float best = level_of(level[l] - pulled[l] * inverse * step[l], low[l], high[l]);
                moved[i * lanes + l] = (best - level[l]) * s[l];
                level[l] = best;
            }
        }
        product(columns, count, h + first, n, moved, pull, lanes, set, 1);
    }
}

/* descent.descend of one tile. */
INLINE int descend(const Job *f, Tile t, int lanes, int set) {
    const int group = f->group;
    const int64_t n = f->n;
    const float *h = f->h + t.expert * n * n;
    const size_t part = (size_t)group * lanes;
    const Half half = half_of(f, f->half_h, t.expert);
    float *away = malloc((n * lanes + 2 * part + half.padded * lanes / 2) * sizeof(float));
    if (!away) return NO_MEMORY;
    float *pull = away + n * lanes, *hx = pull + part;
    uint32_t *pairs = (uint32_t *)(hx + part);
    for (int sweep = -1; sweep < f->sweeps; sweep++) { /* at first what is away is but put down */
        for (int64_t start = 0, g = 0; start < n; start += group, g++) {
            const int columns = (int)(n - start < group ? n - start : group);
            const float *square = h + start * n + start;
            float *x = t.level + start * lanes, *s = t.scale + g * lanes, *z = t.zero + g * lanes;
            if (sweep >= 0) {
                if (half.padded)
                    product_amx(columns, half.padded, half.rows + start * half.stride, half.stride, pairs, pull, 0);
                else
                    product(columns, n, h + start * n, n, away, pull, lanes, set, 0);
                best_scale(columns, x, pull, square, n, s, hx, lanes, set);
                move_codes(f, columns, x, pull, square, n, s, z, lanes, set);
                best_scale(columns, x, pull, square, n, s, hx, lanes, set);
            }
            for (int j = 0; j < columns; j++) {
                const int64_t row = (start + j) * lanes;
                EACH_LANE away[row + l] = t.level[row + l] * s[l] - t.w[row + l];
            }
            if (half.padded) pair_rows(away + start * lanes, columns, pairs + start / 2 * LANES);
        }
    }
    free(away);
    return DONE;
}

/* -------------------------------------------------------------------------------------------------- matrices */

/* Rows of [rows, out] that a tile has a part of, from memory or back into it. */
INLINE void load_all(float *tile, const float *from, int64_t rows, int64_t out, int held, int lanes) {
    for (int64_t j = 0; j < rows; j++) load(tile + j * lanes, from + j * out, held, lanes);
}

INLINE void store_all(float *to, const float *tile, int64_t rows, int64_t out, int held, int lanes) {
    for (int64_t j = 0; j < rows; j++) store(to + j * out, tile + j * lanes, held, lanes);
}

/* A tile's levels as codes, turned to [out, n]: four of an output in a word. */
INLINE void store_codes(const Job *f, Tile t, int lanes) {
    enum { WORDS = 16 };
    uint8_t *codes = f->codes + (t.expert * f->out + t.first) * f->n;
    for (int64_t start = 0; start < f->n; start += 4 * WORDS) {
        const int count = (int)(f->n - start < 4 * WORDS ? f->n - start : 4 * WORDS);
        uint32_t words[WORDS * LANES] = {0}, row[WORDS];
        for (int j = 0; j < count; j++) {
            const float *level = t.level + (start + j) * lanes, *zero = t.zero + (start + j) / f->group * lanes;
            uint32_t *to = words + j / 4 * lanes;
            EACH_LANE to[l] |= (uint32_t)(int32_t)(level[l] + zero[l]) << 8 * (j % 4);
        }
        for (int l = 0; l < t.held; l++) {
            for (int i = 0; i < WORDS; i++) row[i] = words[i * lanes + l];
            memcpy(codes + l * f->n + start, row, count);
        }
    }
}

INLINE int tiles(const Job *f, int64_t first, int64_t step, int lanes, int set) {
    const int64_t n = f->n, groups = (n + f->group - 1) / f->group, each = (f->out + lanes - 1) / lanes;
    float *room = malloc(2 * (n + groups) * lanes * sizeof(float));
    int found = room ? DONE : NO_MEMORY;
    for (int64_t i = first; i < f->experts * each && found == DONE; i += step) {
        const int64_t expert = i / each, at = i % each * lanes, left = f->out - at;
        const int held = (int)(left < lanes ? left : lanes);
        const int64_t matrix = expert * n * f->out + at, grouped = expert * groups * f->out + at;
        const Tile t = {expert, at, held, room, room + n * lanes, room + 2 * n * lanes, room + (2 * n + groups) * lanes};
        load_all(t.w, f->w + matrix, n, f->out, held, lanes);
        if (f->order) {
            found = feed_back(f, t, lanes, set);
        } else {
            load_all(t.level, f->level + matrix, n, f->out, held, lanes);
            load_all(t.scale, f->scale + grouped, groups, f->out, held, lanes);
            load_all(t.zero, f->zero + grouped, groups, f->out, held, lanes);
            for (int64_t g = 0; g < groups; g++)
                for (int l = held; l < lanes; l++) t.scale[g * lanes + l] = 1;
        }
        if (f->sweeps && found == DONE) found = descend(f, t, lanes, set);
        store_all(f->scale + grouped, t.scale, groups, f->out, held, lanes);
        store_all(f->zero + grouped, t.zero, groups, f->out, held, lanes);
        if (f->codes)
            store_codes(f, t, lanes);
        else
            store_all(f->level + matrix, t.level, n, f->out, held, lanes);
    }
    free(room);
    return found;
}

/* Few outputs take narrow tiles. */
#define TILES(name, attribute, set)                                                                                   \
    attribute static int name(const void *job, int64_t first, int64_t step) {                                         \
        const Job *f = job;                                                                                           \
        return f->out > 2 * FEW_LANES ? tiles(f, first, step, LANES, set) : tiles(f, first, step, FEW_LANES, set);    \
    }

TILES(tiles_avx2, WITH_AVX2, AVX2)
TILES(tiles_512, WITH_AVX512, AVX512)

/* With half_mt or half_h. */
static int tiles_amx(const void *job, int64_t first, int64_t step) {
    begin_amx();
    const int found = tiles_512(job, first, step);
    end_amx();
    return found;
}

static int in_use = NONE;

/* Chooses at most this set of instructions (product.h) and returns it. AMX takes jobs that come with halves. */
int mopeq_gptq_set(int most) { return in_use = widest_set(most); }

/* Whether a job of such groups and outputs should come with halves. */
int mopeq_gptq_tiled(int group, int64_t out) { return in_use == AMX && group % 32 == 0 && out > 2 * FEW_LANES; }

/* Each thread takes a tile, and others after it. */
int mopeq_gptq(const Job *f, int64_t threads) {
    return in_shares(f->half_mt || f->half_h ? tiles_amx : in_use == AVX2 ? tiles_avx2 : tiles_512, f, threads);
}
