/* Codes of a layer to and from its stream of bytes (docs/format.md); the order of words is that of shim/streams.py.
   Sizes, classes and tables have been checked before; states and words are trusted in nothing. */

enum { LANES = 32, PLACES = 4096, STEPS = 64, ESCAPED = -32768 };
#define LOWEST 65536u

typedef struct {
    int64_t m, n, lane_rows;
    const uint8_t *rows, *columns; /* classes; a sum of two is a table */
    const int32_t *frequencies;    /* of -K..K of each table, one after another; the escape has the rest */
    const int32_t *widths;         /* K of each table */
    int32_t tables, threads;
} Classes;

static int64_t chunks_of(const Classes *c) {
    const int64_t lanes = (c->m + c->lane_rows - 1) / c->lane_rows;
    return (lanes + LANES - 1) / LANES;
}

/* `count` (at most 32) states a step on, and past the words that they take; 1 if there are too few. */
INLINE int step_on(uint32_t *restrict x, const uint32_t *restrict offset, const uint32_t *restrict moves,
                   const int16_t *restrict codes, int16_t *restrict out, int count, const uint16_t **words,
                   const uint16_t *stop) {
    const uint16_t *at = *words;
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

typedef struct {
    int64_t *at; /* entries that escaped, in no order */
    int64_t found, room;
} Escapes;

/* `steps` codes of each lane from the tile to their rows, in `width` bytes; 1 if one does not fit. */
INLINE int put_codes(const int16_t (*tile)[LANES], int lanes, int steps, int64_t first, int64_t stride, void *out, int width,
               Escapes *escapes) {
    int damaged = 0;
    for (int lane = 0; lane < lanes; lane++) {
        const int64_t to = first + lane * stride;
        int low = 0, high = 0;
        int16_t line[STEPS];
        for (int s = 0; s < steps; s++) {
            line[s] = tile[s][lane];
            low = line[s] < low ? line[s] : low;
            high = line[s] > high ? line[s] : high;
        }
        if (low == ESCAPED)
            for (int s = low = 0; s < steps; s++) {
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

static int decode_chunk(const Classes *c, const uint32_t *moves, const int16_t *codes, int64_t chunk,
                        const uint32_t *states, const uint16_t *at, const uint16_t *stop, void *out, int width,
                        Escapes *escapes) {
    const int64_t top = chunk * LANES * c->lane_rows, stride = c->lane_rows * c->n;
    const int64_t left = c->m - top < LANES * c->lane_rows ? c->m - top : LANES * c->lane_rows; /* rows */
    const int lanes = (int)((left + c->lane_rows - 1) / c->lane_rows);
    uint32_t x[LANES], offset[LANES];
    int16_t tile[STEPS][LANES];
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

static int ascending(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* out: (m, n) of `width` bytes each. Returns 0; 1 if the stream is damaged; 2 if there is no memory. */
int losparse_decode_codes(const Classes *c, const uint32_t *counts, const uint32_t *states, const uint16_t *words,
                          const int32_t *values, int64_t escaped, int width, void *out) {
    const int64_t chunks = chunks_of(c);
    uint32_t *moves = malloc(sizeof *moves * c->tables * PLACES); /* frequency << 16 | distance from its start */
    int16_t *codes = malloc(sizeof *codes * c->tables * PLACES);
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
    starts[0] = 0;
    for (int64_t k = 0; k < chunks; k++) starts[k + 1] = starts[k] + counts[k];
    damaged = 0;
#pragma omp parallel for num_threads(c->threads) schedule(dynamic) reduction(| : damaged)
    for (int64_t k = 0; k < chunks; k++)
        damaged |= decode_chunk(c, moves, codes, k, states, words + starts[k], words + starts[k + 1], out, width,
                                &escapes);
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
