/* Products of one tile of 16 rows. cpu.c includes this once for each set of instructions, with LANES rows to a vector
   and OF(name) to tell the functions apart. */

typedef uint32_t OF(Words) __attribute__((vector_size(4 * LANES)));
typedef int32_t OF(Ints) __attribute__((vector_size(4 * LANES)));
typedef float OF(Floats) __attribute__((vector_size(4 * LANES)));
#define Words OF(Words)
#define Ints OF(Ints)
#define Floats OF(Floats)

/* Vector i of the 8 of a chunk, from its `bits` words: in each byte a code. */
INLINE TARGET Words OF(unpack)(int bits, const Words *words, int i) {
    Words v = {0};
    UNROLL
    for (int j = 0; j < bits; j++) {
        const Piece p = piece(bits, i, j);
        if (p.n == 0) continue;
        const int down = p.at - p.of;
        Words w = down < 0 ? words[j] << (uint32_t)-down : words[j] >> (uint32_t)down;
        v |= w & (p.mask << p.of);
    }
    return v;
}

INLINE TARGET void OF(load)(int bits, const uint8_t *codes, Words *words) {
    UNROLL
    for (int j = 0; j < bits; j++) memcpy(words + j, codes + 4 * TILE * j, sizeof *words);
}

INLINE TARGET Floats OF(scale)(const uint8_t *scales) {
#if LANES == 16
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
#elif LANES == 8
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales));
#else
    uint16_t half[LANES];
    memcpy(half, scales, sizeof half);
    return (Floats){half_to_float(half[0]), half_to_float(half[1]), half_to_float(half[2]), half_to_float(half[3])};
#endif
}

INLINE TARGET Floats OF(zero)(int middle, const uint8_t *zeros) {
    if (middle) return (Floats){0} + (float)middle;
#if LANES == 16
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zeros)));
#elif LANES == 8
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)zeros)));
#else
    return (Floats){zeros[0], zeros[1], zeros[2], zeros[3]};
#endif
}

/* A block of one activation in floats: what is too loud for integers, and plain C. out [LANES]. */
INLINE TARGET void OF(block_in_floats)(int bits, const Tile *t, int64_t block, const float *x, float *out) {
    const uint8_t *codes = t->codes + block * BLOCK / 8 * bits * TILE;
    Floats sum, part = {0}, zero = {0};
    memcpy(&sum, out, sizeof sum);
    for (int at = 0; at < BLOCK; at += CHUNK, codes += 4 * TILE * bits) {
        Words words[8];
        OF(load)(bits, codes, words);
        UNROLL
        for (int i = 0; i < 8; i++) {
            const int64_t k = at + 4 * i, of = (block * BLOCK + k) / t->group, g = of < t->last ? of : t->last;
            if (k % t->unit == 0) zero = OF(zero)(t->middle, t->zeros + g * TILE);
            Words v = OF(unpack)(bits, words, i);
            for (int byte = 0; byte < 4; byte++)
                part += (__builtin_convertvector((Ints)(v >> (uint32_t)(8 * byte) & 255), Floats) - zero) * x[k + byte];
            if ((k + 4) % t->unit == 0) sum += part * OF(scale)(t->scales + 2 * g * TILE), part = (Floats){0};
        }
    }
    memcpy(out, &sum, sizeof sum);
}

#if LANES > 4
/* acc += four codes times four x, for each row. */
INLINE TARGET Words OF(dot)(int bits, Words acc, Words v, const int8_t *x) {
#if LANES == 16 /* in words of its own: compilers load x first, which takes a third more instructions */
    (void)bits;
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(v), "m"(*(const int32_t *)x));
    return acc;
#else
    int32_t four;
    memcpy(&four, x, 4);
    const __m256i by = _mm256_set1_epi32(four), low = _mm256_set1_epi8(15);
    __m256i pairs = _mm256_maddubs_epi16(bits == 8 ? _mm256_and_si256((__m256i)v, low) : (__m256i)v, by);
    if (bits <= 4) return (Words)_mm256_add_epi16((__m256i)acc, pairs); /* of 16 bits: a chain's 8 of a block fit */
    acc += (Words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    if (bits < 8) return acc;
    pairs = _mm256_maddubs_epi16(_mm256_and_si256((__m256i)(v >> 4), low), by); /* of 8 bits not even two would */
    return acc + (Words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(16));
#endif
}

INLINE TARGET Floats OF(summed)(int bits, Words a, Words b) {
#if LANES == 8
    const __m256i one = _mm256_set1_epi16(1);
    if (bits <= 4) a = (Words)_mm256_madd_epi16((__m256i)a, one), b = (Words)_mm256_madd_epi16((__m256i)b, one);
#endif
    (void)bits;
    return __builtin_convertvector((Ints)(a + b), Floats);
}

/* Vector i of a chunk's codes times `ms` activations in `parts` parts, for which a block's x follow each other. One
   activation takes two chains of sums in turn: one alone would wait for itself. */
INLINE TARGET void OF(step)(int bits, int parts, int ms, int i, const Words *words, const int8_t *const *x,
                            Words (*acc)[4][3]) {
    Words v = OF(unpack)(bits, words, i);
    for (int r = 0; r < ms; r++)
        for (int p = 0; p < parts; p++) {
            Words *to = &acc[ms == 1 ? i % 2 : 0][r][p];
            *to = OF(dot)(bits, *to, v, x[r] + p * BLOCK + 4 * i);
        }
}

/* out [ms, TILE] = the tile's rows times `ms` activations. `usual`: groups hold whole blocks. */
INLINE TARGET void OF(times)(int bits, int parts, int usual, int ms, const Tile *t, const Activations *a,
                             const int32_t *rows, float *out) {
    const int64_t blocks = a->stride / BLOCK;
    const int unit = usual ? BLOCK : t->unit;
    for (int from = 0; from < TILE; from += LANES) {
        const uint8_t *codes = t->codes + 4 * from, *scales = t->scales + 2 * from, *zeros = t->zeros + from;
        const int8_t *x[4];
        const float *stats[4];
        Floats sum[4];
        for (int r = 0; r < ms; r++) {
            x[r] = a->parts + rows[r] * parts * a->stride, stats[r] = a->stats + rows[r] * blocks * STATS;
            sum[r] = (Floats){0};
        }
        Words acc[2][4][3] = {0};
        int64_t groups_left = t->last;
        int left = t->group; /* of the group's inputs */
        for (int64_t block = 0; block < blocks; block++) {
            UNROLL
            for (int chunk = 0; chunk < 2; chunk++, codes += 4 * TILE * bits) {
                Words words[8];
                OF(load)(bits, codes, words);
                for (int line = 0; from == 0 && line < bits; line++) __builtin_prefetch(codes + AHEAD + 64 * line, 0, 2);
                UNROLL
                for (int half = 0; half < 2; half++) {
                    OF(step)(bits, parts, ms, 4 * half, words, x, acc);
                    OF(step)(bits, parts, ms, 4 * half + 1, words, x, acc);
                    OF(step)(bits, parts, ms, 4 * half + 2, words, x, acc);
                    OF(step)(bits, parts, ms, 4 * half + 3, words, x, acc);
                    if (unit == UNIT || (half == 1 && (unit == CHUNK || chunk == 1))) {
                        Floats scale = OF(scale)(scales), zero = OF(zero)(t->middle, zeros);
                        const int of = unit == BLOCK ? 1 : unit == CHUNK ? 2 + chunk : 4 + 2 * chunk + half;
                        for (int r = 0; r < ms; r++) {
                            Floats f = OF(summed)(bits, acc[0][r][0], acc[1][r][0]);
                            for (int p = 1; p < parts; p++)
                                f = f * 128.0f + OF(summed)(bits, acc[0][r][p], acc[1][r][p]);
                            sum[r] += scale * (f * stats[r][0] - zero * stats[r][of]);
                            for (int p = 0; p < parts; p++) acc[0][r][p] = acc[1][r][p] = (Words){0};
                        }
                        left -= unit;
                        if (left == 0 && groups_left-- > 0) left = t->group, scales += 2 * TILE, zeros += TILE;
                    }
                }
                for (int r = 0; r < ms; r++) x[r] += CHUNK;
            }
            for (int r = 0; r < ms; r++) x[r] += (parts - 1) * BLOCK, stats[r] += STATS;
        }
        for (int r = 0; r < ms; r++) memcpy(out + r * TILE + from, sum + r, sizeof *sum);
    }
}
#endif

/* The zero points of a tile, a byte each: to [groups, TILE]. */
INLINE TARGET void OF(zeros)(int bits, const uint8_t *from, int64_t groups, uint8_t *to) {
    for (int64_t g = 0; g < groups; g++)
        for (int half = 0; half < 2; half++, from += bits, to += 8) {
            uint64_t v = spread(bits, read_bytes(bits, from));
            memcpy(to, &v, 8);
        }
}

/* out [m, TILE] = the tile's rows times m activations. */
INLINE TARGET void OF(rows)(int bits, int parts, const Tile *t, const Activations *a, const float *x, int64_t in,
                            const int32_t *rows, int m, float *out) {
    const int64_t blocks = a->stride / BLOCK;
#if LANES > 4
    for (int r = 0, ms; r < m; r += ms) {
        float *to = out + r * TILE;
        ms = LANES < 16 || t->unit < BLOCK || m - r < 2 ? 1 : m - r < 4 ? 2 : 4; /* of 16 registers one takes most */
        if (t->unit < BLOCK)
            OF(times)(bits, parts, 0, 1, t, a, rows + r, to);
        else if (ms == 1)
            OF(times)(bits, parts, 1, 1, t, a, rows + r, to);
        else if (ms == 2)
            OF(times)(bits, parts, 1, 2, t, a, rows + r, to);
        else
            OF(times)(bits, parts, 1, 4, t, a, rows + r, to);
    }
#else
    (void)parts;
    memset(out, 0, (size_t)m * TILE * 4);
#endif
    for (int r = 0; r < m; r++)
        for (int64_t b = 0; b < blocks; b++) {
            if (LANES > 4 && !a->apart[rows[r] * blocks + b]) continue;
            float some[BLOCK] = {0};
            int64_t n = in - b * BLOCK < BLOCK ? in - b * BLOCK : BLOCK;
            memcpy(some, x + rows[r] * in + b * BLOCK, (size_t)n * 4);
            for (int from = 0; from < TILE; from += LANES) {
                Tile part = *t;
                part.codes += 4 * from, part.scales += 2 * from, part.zeros += from;
                OF(block_in_floats)(bits, &part, b, some, out + r * TILE + from);
            }
        }
}

#define OF_WIDTH(BITS)                                                                                                \
    TARGET static void OF(rows_##BITS)(int parts, const Tile *t, const Activations *a, const float *x, int64_t in,    \
                                       const int32_t *rows, int m, float *out, uint8_t *zeros, int64_t groups) {      \
        if (!t->middle) OF(zeros)(BITS, t->zeros, groups, zeros);                                                     \
        Tile tile = *t;                                                                                               \
        tile.zeros = zeros;                                                                                           \
        if (parts == 2 && LANES > 4)                                                                                  \
            OF(rows)(BITS, 2, &tile, a, x, in, rows, m, out);                                                         \
        else                                                                                                          \
            OF(rows)(BITS, 3, &tile, a, x, in, rows, m, out);                                                         \
    }
OF_WIDTH(1) OF_WIDTH(2) OF_WIDTH(3) OF_WIDTH(4) OF_WIDTH(5) OF_WIDTH(6) OF_WIDTH(7) OF_WIDTH(8)
static RowsOfTile *const OF(ROWS)[9] = {0, OF(rows_1), OF(rows_2), OF(rows_3), OF(rows_4),
                                        OF(rows_5), OF(rows_6), OF(rows_7), OF(rows_8)};
#undef OF_WIDTH
#undef Words
#undef Ints
#undef Floats
#undef LANES
#undef TARGET
#undef OF
