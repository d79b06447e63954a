/* Codes of a layer to and from its stream of bytes (docs/format.md); the order of words is that of shim/streams.py.
   Sizes, classes and tables have been checked before; states and words are trusted in nothing. */

enum { LANES = 32, PLACES = 4096, STEPS = 64, ESCAPED = -32768 };
#define LOWEST 65536u
typedef uint16_t Loose __attribute__((aligned(1))); /* words lie in the file wherever it had room */

typedef struct {
    int64_t m, n, lane_rows;
    const uint8_t *rows, *columns; /* classes; a sum of two is a table */
    const int32_t *frequencies;    /* of -K..K of each table, one after another; the escape has the rest */
    const int32_t *widths;         /* K of each table */
    int32_t tables, threads, level;
} Classes;

static int64_t chunks_of(const Classes *c) {
    const int64_t lanes = (c->m + c->lane_rows - 1) / c->lane_rows;
    return (lanes + LANES - 1) / LANES;
}

/* `count` (at most 32) states a step on, and past the words that they take; 1 if there are too few. */
INLINE int step_on(uint32_t *restrict x, const uint32_t *restrict offset, const uint32_t *restrict moves,
                   const int16_t *restrict codes, int16_t *restrict out, int count, const Loose **words,
                   const Loose *stop) {
    const Loose *at = *words;
    if (stop - at >= count) {
        for (int lane = 0; lane < count; lane++) {
            const uint32_t place = offset[lane] + (x[lane] & (PLACES - 1)), move = moves[place];
            const uint32_t next = (move >> 16) * (x[lane] >> 12) + (move & 0xffff), more = next < LOWEST;
            const uint32_t longer = next << 16 | *at;
            out[lane] = codes[place];
            x[lane] = more ? longer : next;
            at += more;
        }
    } else
        for (int lane = 0; lane < count; lane++) {
            const uint32_t place = offset[lane] + (x[lane] & (PLACES - 1)), move = moves[place];
            x[lane] = (move >> 16) * (x[lane] >> 12) + (move & 0xffff);
            out[lane] = codes[place];
            if (x[lane] >= LOWEST) continue;
            if (at == stop) return 1;
            x[lane] = x[lane] << 16 | *at++;
        }
    *words = at;
    return 0;
}

#if defined(__x86_64__)
/* The same for all lanes in AVX2; of words there are 8 more than the lanes may take. The words that a group of eight takes
   go to those of its lanes that need one, by `spread` (256, 8): from which of them for each set of lanes. */
AVX2 static inline void step_of_all(uint32_t *x, const uint32_t *offset, const uint32_t *moves, const int16_t *codes,
                                    int16_t *out, const Loose **words, const uint8_t *spread) {
    const Loose *at = *words;
    const __m256i places = _mm256_set1_epi32(PLACES - 1), low = _mm256_set1_epi32(0xffff), zero = _mm256_setzero_si256();
    UNROLL for (int pair = 0; pair < LANES / 16; pair++) {
        __m256i found[2];
        UNROLL for (int half = 0; half < 2; half++) {
            const int lane = 16 * pair + 8 * half;
            const __m256i state = _mm256_loadu_si256((const __m256i *)(x + lane));
            const __m256i from = _mm256_loadu_si256((const __m256i *)(offset + lane));
            const __m256i place = _mm256_add_epi32(from, _mm256_and_si256(state, places));
            const __m256i move = _mm256_i32gather_epi32((const int *)moves, place, 4);
            found[half] = _mm256_and_si256(_mm256_i32gather_epi32((const int *)codes, place, 2), low);
            const __m256i frequency = _mm256_srli_epi32(move, 16), higher = _mm256_srli_epi32(state, 12);
            const __m256i next = _mm256_add_epi32(_mm256_mullo_epi32(frequency, higher), _mm256_and_si256(move, low));
            const __m256i more = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 16), zero);
            const int lanes = _mm256_movemask_ps(_mm256_castsi256_ps(more));
            const __m256i line = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
            const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(spread + 8 * lanes)));
            const __m256i word = _mm256_permutevar8x32_epi32(line, order);
            const __m256i longer = _mm256_or_si256(_mm256_slli_epi32(next, 16), word);
            _mm256_storeu_si256((__m256i *)(x + lane), _mm256_blendv_epi8(next, longer, more));
            at += __builtin_popcount((unsigned)lanes);
        }
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(found[0], found[1]), 0xd8);
        _mm256_storeu_si256((__m256i *)(out + 16 * pair), packed);
    }
    *words = at;
}

/* lines (LANES, STEPS) = tile (STEPS, LANES) the other way round, eight by eight. */
INLINE void turn_round(const int16_t (*tile)[LANES], int16_t (*lines)[STEPS]) {
    for (int s = 0; s < STEPS; s += 8)
        for (int lane = 0; lane < LANES; lane += 8) {
            __m128i a[8], b[8];
            UNROLL for (int k = 0; k < 8; k++) a[k] = _mm_loadu_si128((const __m128i *)(tile[s + k] + lane));
            UNROLL for (int k = 0; k < 4; k++) {
                b[2 * k] = _mm_unpacklo_epi16(a[2 * k], a[2 * k + 1]);
                b[2 * k + 1] = _mm_unpackhi_epi16(a[2 * k], a[2 * k + 1]);
            }
            UNROLL for (int k = 0; k < 2; k++)
                UNROLL for (int h = 0; h < 2; h++) {
                    a[4 * k + 2 * h] = _mm_unpacklo_epi32(b[4 * k + h], b[4 * k + 2 + h]);
                    a[4 * k + 2 * h + 1] = _mm_unpackhi_epi32(b[4 * k + h], b[4 * k + 2 + h]);
                }
            UNROLL for (int k = 0; k < 4; k++) {
                _mm_storeu_si128((__m128i *)(lines[lane + 2 * k] + s), _mm_unpacklo_epi64(a[k], a[4 + k]));
                _mm_storeu_si128((__m128i *)(lines[lane + 2 * k + 1] + s), _mm_unpackhi_epi64(a[k], a[4 + k]));
            }
        }
}
#else
INLINE void turn_round(const int16_t (*tile)[LANES], int16_t (*lines)[STEPS]) {
    for (int s = 0; s < STEPS; s++)
        for (int lane = 0; lane < LANES; lane++) lines[lane][s] = tile[s][lane];
}
#endif

typedef struct {
    int64_t *at; /* entries that escaped, in no order */
    int64_t found, room;
} Escapes;

/* `steps` codes of each lane from the tile to their rows, in `width` bytes; 1 if one does not fit. */
INLINE int put_codes(const int16_t (*tile)[LANES], int lanes, int steps, int64_t first, int64_t stride, void *out, int width,
               Escapes *escapes) {
    int damaged = 0;
    int16_t lines[LANES][STEPS];
    turn_round(tile, lines);
    for (int lane = 0; lane < lanes; lane++) {
        const int64_t to = first + lane * stride;
        int16_t *line = lines[lane], low = 0, high = 0;
        for (int s = 0; s < steps; s++) {
            low = line[s] < low ? line[s] : low;
            high = line[s] > high ? line[s] : high;
        }
        if (low == ESCAPED)
            for (int s = low = 0; s < steps; s++) { /* low: of the others */
                if (line[s] == ESCAPED) {
                    int64_t k;
#pragma omp atomic capture
                    k = escapes->found++;
                    if (k < escapes->room) escapes->at[k] = to + s;
                    line[s] = 0;
                }
                low = line[s] < low ? line[s] : low;
            }
        if (width == 1) {
            damaged |= low < -128 || high > 127;
            for (int s = 0; s < steps; s++) ((int8_t *)out)[to + s] = (int8_t)line[s];
        } else if (width == 2)
            memcpy((int16_t *)out + to, line, 2 * steps);
        else
            for (int s = 0; s < steps; s++) ((int32_t *)out)[to + s] = line[s];
    }
    return damaged;
}

typedef void AllSteps(uint32_t *, const uint32_t *, const uint32_t *, const int16_t *, int16_t *, const Loose **,
                      const uint8_t *);

INLINE int decode_any(const Classes *c, const uint32_t *moves, const int16_t *codes, int64_t chunk,
                      const uint32_t *states, const Loose *at, const Loose *stop, void *out, int width,
                      Escapes *escapes, const uint8_t *spread, AllSteps *all) {
    const int64_t top = chunk * LANES * c->lane_rows, stride = c->lane_rows * c->n;
    const int64_t left = c->m - top < LANES * c->lane_rows ? c->m - top : LANES * c->lane_rows; /* rows */
    const int lanes = (int)((left + c->lane_rows - 1) / c->lane_rows);
    uint32_t x[LANES], offset[LANES];
    int16_t tile[STEPS][LANES] = {{0}};
    for (int lane = 0; lane < lanes; lane++) {
        x[lane] = states[chunk * LANES + lane];
        if (x[lane] < LOWEST) return 1;
    }
    for (int64_t row = 0; row < c->lane_rows && row < left; row++) {
        const int active = (lanes - 1) * c->lane_rows + row < left ? lanes : lanes - 1; /* the last may be shorter */
        for (int lane = 0; lane < active; lane++) offset[lane] = c->rows[top + lane * c->lane_rows + row] * PLACES;
        for (int64_t j = 0; j < c->n; j += STEPS) {
            const int steps = c->n - j < STEPS ? (int)(c->n - j) : STEPS;
            for (int s = 0; s < steps; s++) {
                const int64_t skip = (int64_t)c->columns[j + s] * PLACES;
                if (all && active == LANES && stop - at >= LANES + 8) {
                    all(x, offset, moves + skip, codes + skip, tile[s], &at, spread);
                    continue;
                }
                if (active == LANES ? step_on(x, offset, moves + skip, codes + skip, tile[s], LANES, &at, stop)
                                    : step_on(x, offset, moves + skip, codes + skip, tile[s], active, &at, stop))
                    return 1;
            }
            if (put_codes((const int16_t(*)[LANES])tile, active, steps, (top + row) * c->n + j, stride, out, width, escapes))
                return 1;
        }
    }
    for (int lane = 0; lane < lanes; lane++)
        if (x[lane] != LOWEST) return 1;
    return at != stop;
}

typedef int Decode(const Classes *, const uint32_t *, const int16_t *, int64_t, const uint32_t *, const Loose *,
                   const Loose *, void *, int, Escapes *, const uint8_t *);
#define DECODE(NAME, TARGET, ALL)                                                                                     \
    TARGET static int NAME(const Classes *c, const uint32_t *moves, const int16_t *codes, int64_t chunk,              \
                           const uint32_t *states, const Loose *at, const Loose *stop, void *out, int width,    \
                           Escapes *escapes, const uint8_t *spread) {                                                 \
        return decode_any(c, moves, codes, chunk, states, at, stop, out, width, escapes, spread, ALL);                \
    }
DECODE(decode_plain, , NULL)
#if defined(__x86_64__)
DECODE(decode_avx2, AVX2, step_of_all)
#endif

static int ascending(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* out: (m, n) of `width` bytes each. Returns 0; 1 if the stream is damaged; 2 if there is no memory. */
int losparse_decode_codes(const Classes *c, const uint32_t *counts, const uint32_t *states, const Loose *words,
                          const int32_t *values, int64_t escaped, int width, void *out) {
    const int64_t chunks = chunks_of(c);
    uint32_t *moves = malloc(sizeof *moves * c->tables * PLACES); /* frequency << 16 | distance from its start */
    int16_t *codes = malloc(sizeof *codes * (c->tables * PLACES + 1)); /* one more, which a gather reads along */
    uint8_t spread[256][8];
    Decode *decode = decode_plain;
#if defined(__x86_64__)
    if (c->level >= LEVEL_AVX2) decode = decode_avx2;
#endif
    int64_t *starts = malloc(sizeof *starts * (chunks + 1));
    Escapes escapes = {malloc(sizeof *escapes.at * (escaped + 1)), 0, escaped};
    int damaged = 2;
    if (!moves || !codes || !starts || !escapes.at) goto done;
    const int32_t *frequencies = c->frequencies;
    for (int t = 0; t < c->tables; t++) {
        const int K = c->widths[t];
        int place = t * PLACES;
        for (int code = -K; code <= K; code++, frequencies++)
            for (int k = 0; k < *frequencies; k++, place++) {
                moves[place] = (uint32_t)*frequencies << 16 | (uint32_t)k;
                codes[place] = (int16_t)code;
            }
        const int rest = (t + 1) * PLACES - place;
        for (int k = 0; k < rest; k++, place++) {
            moves[place] = (uint32_t)rest << 16 | (uint32_t)k;
            codes[place] = ESCAPED;
        }
    }
    codes[c->tables * PLACES] = 0;
    for (int set = 0; set < 256; set++)
        for (int lane = 0, k = 0; lane < 8; lane++) {
            spread[set][lane] = (uint8_t)k;
            k += set >> lane & 1;
        }
    starts[0] = 0;
    for (int64_t k = 0; k < chunks; k++) starts[k + 1] = starts[k] + counts[k];
    damaged = 0;
#pragma omp parallel for num_threads(c->threads) schedule(dynamic) reduction(| : damaged)
    for (int64_t k = 0; k < chunks; k++)
        damaged |= decode(c, moves, codes, k, states, words + starts[k], words + starts[k + 1], out, width, &escapes,
                          spread[0]);
    damaged |= escapes.found != escaped;
    if (!damaged && escaped) {
        qsort(escapes.at, escaped, sizeof *escapes.at, ascending);
        for (int64_t k = 0; k < escaped; k++) {
            const int64_t to = escapes.at[k];
            const int32_t value = values[k];
            if (width == 1) {
                damaged |= value < -128 || value > 127;
                ((int8_t *)out)[to] = (int8_t)value;
            } else if (width == 2) {
                damaged |= value < -32768 || value > 32767;
                ((int16_t *)out)[to] = (int16_t)value;
            } else
                ((int32_t *)out)[to] = value;
        }
    }
done:
    free(moves), free(codes), free(starts), free(escapes.at);
    return damaged;
}

INLINE int64_t place_of(int64_t value, int64_t widest) {
    return value < -widest || value > widest ? 2 * widest + 1 : value + widest;
}

/* One chunk, backwards, its words up to `end`; returns where they begin. marks: start << 16 | frequency of -widest..
   widest and of the escape, for each table. escapes: whether there are any. */
static uint16_t *encode_chunk(const Classes *c, const uint32_t *marks, int64_t widest, int64_t chunk,
                              const int32_t *values, uint32_t *states, uint16_t *end, uint8_t *escapes) {
    const int64_t top = chunk * LANES * c->lane_rows, size = 2 * widest + 2;
    const int64_t left = c->m - top < LANES * c->lane_rows ? c->m - top : LANES * c->lane_rows;
    const int lanes = (int)((left + c->lane_rows - 1) / c->lane_rows);
    uint32_t x[LANES], tile[STEPS][LANES];
    uint8_t escaped = 0;
    for (int lane = 0; lane < lanes; lane++) x[lane] = LOWEST;
    for (int64_t row = (c->lane_rows < left ? c->lane_rows : left) - 1; row >= 0; row--) {
        const int active = (lanes - 1) * c->lane_rows + row < left ? lanes : lanes - 1;
        for (int64_t j = (c->n - 1) / STEPS * STEPS; j >= 0; j -= STEPS) {
            const int steps = c->n - j < STEPS ? (int)(c->n - j) : STEPS;
            for (int lane = 0; lane < active; lane++) {
                const int64_t i = top + lane * c->lane_rows + row;
                const int32_t *line = values + i * c->n + j;
                const uint32_t *of_row = marks + c->rows[i] * size;
                for (int s = 0; s < steps; s++) {
                    const uint32_t *of_table = of_row + c->columns[j + s] * size;
                    tile[s][lane] = of_table[place_of(line[s], widest)];
                    escaped |= tile[s][lane] == of_table[size - 1];
                }
            }
            for (int s = steps - 1; s >= 0; s--)
                for (int lane = active - 1; lane >= 0; lane--) {
                    const uint32_t f = tile[s][lane] & 0xffff, full = x[lane] >= (uint64_t)f << 20;
                    end[-1] = (uint16_t)x[lane]; /* a code takes a word at most, so there is room for one */
                    end -= full;
                    x[lane] >>= 16 * full;
                    x[lane] += x[lane] / f * (PLACES - f) + (tile[s][lane] >> 16);
                }
        }
    }
    for (int lane = 0; lane < lanes; lane++) states[chunk * LANES + lane] = x[lane];
    *escapes = escaped;
    return end;
}

/* counts: (chunks); states: one a lane; words and escapes: room for m * n each, and those of the stream at its beginning
   afterwards. Returns how many escapes, or -1 if there is no memory. */
int64_t losparse_encode_codes(const Classes *c, const int32_t *values, uint32_t *counts, uint32_t *states,
                              uint16_t *words, int32_t *escapes) {
    const int64_t chunks = chunks_of(c);
    int64_t widest = 0;
    for (int t = 0; t < c->tables; t++) widest = c->widths[t] > widest ? c->widths[t] : widest;
    const int64_t size = 2 * widest + 2;
    uint32_t *marks = malloc(sizeof *marks * c->tables * size);
    uint8_t *escaped = malloc(chunks);
    if (!marks || !escaped) {
        free(marks), free(escaped);
        return -1;
    }
    const int32_t *frequencies = c->frequencies;
    for (int t = 0; t < c->tables; t++) {
        const int K = c->widths[t];
        uint32_t start = 0;
        for (int k = 0; k < 2 * K + 1; k++, frequencies++) {
            marks[t * size + widest - K + k] = start << 16 | (uint32_t)*frequencies;
            start += (uint32_t)*frequencies;
        }
        const uint32_t escape = start << 16 | (PLACES - start);
        for (int64_t k = 0; k < size; k++)
            if (k < widest - K || k > widest + K || !(marks[t * size + k] & 0xffff)) marks[t * size + k] = escape;
    }
    const int64_t room = LANES * c->lane_rows * c->n;
#pragma omp parallel for num_threads(c->threads) schedule(dynamic)
    for (int64_t k = 0; k < chunks; k++) {
        uint16_t *end = words + (k + 1 < chunks ? (k + 1) * room : c->m * c->n);
        counts[k] = (uint32_t)(end - encode_chunk(c, marks, widest, k, values, states, end, escaped + k));
    }
    int64_t kept = 0, found = 0;
    for (int64_t k = 0; k < chunks; k++) {
        const int64_t end = k + 1 < chunks ? (k + 1) * room : c->m * c->n;
        memmove(words + kept, words + end - counts[k], 2 * counts[k]);
        kept += counts[k];
        if (!escaped[k]) continue;
        for (int64_t at = k * room; at < end; at++) {
            const uint32_t *of_table = marks + (c->rows[at / c->n] + c->columns[at % c->n]) * size;
            if (of_table[place_of(values[at], widest)] == of_table[size - 1]) escapes[found++] = values[at];
        }
    }
    free(marks), free(escaped);
    return found;
}
