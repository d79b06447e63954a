/* Runs every function of sparse.c on buffers that end where their data ends, under the compiler's sanitizers.

   Prints "checked N" and exits with 0, or the first way's name whose result differs from a plain double product. */

#include "../../losparse_cli/kernels/c/sparse.c"

#include <math.h>
#include <stdio.h>

static uint64_t state = 88172645463325252ULL;

static double uniform(void) { /* xorshift */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double)(state >> 11) / 9007199254740992.0;
}

static void *exact(size_t bytes) { /* memory that begins and ends where it says; of no bytes, too */
    void *p = malloc(bytes ? bytes : 1);
    memset(p, 0, bytes ? bytes : 1);
    return p;
}

static void fill(void *p, int64_t count, int dtype) {
    for (int64_t i = 0; i < count; i++) put(p, i, (float)(uniform() - 0.5), dtype);
}

static int differs(const void *y, const double *expected, int64_t count, int dtype) {
    double error = 0, norm = 1e-30;
    for (int64_t i = 0; i < count; i++) {
        const double e = get(y, i, dtype) - expected[i];
        error += e * e, norm += expected[i] * expected[i];
    }
    return sqrt(error / norm) > (dtype == BFLOAT16 ? 1e-2 : 1e-5);
}

/* (rows, rank): what V makes of each row of x. */
static double *inner_products(const void *V, const void *x, int64_t rank, int64_t rows, int64_t n, int dtype) {
    double *inner = exact(rows * rank * sizeof *inner);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t r = 0; r < rank; r++)
            for (int64_t j = 0; j < n; j++)
                inner[t * rank + r] += (double)get(V, r * n + j, dtype) * get(x, t * n + j, dtype);
    return inner;
}

static int one(int64_t m, int64_t n, int64_t rank, double density, int64_t rows, int dtype, int gaps, int level) {
    const int size = dtype == BFLOAT16 ? 2 : 4;
    const int64_t stride = (n + 7) / 8;
    uint8_t *bits = exact(m * stride), *bytes = exact(m * n + m * n / 255 + 1), *index;
    int32_t *starts = exact((m + 1) * 4), *gap_starts = exact((m + 1) * 4), *found = exact((m + 1) * 4);
    int64_t nnz = 0, at = 0;
    int bad = 0;
    for (int64_t i = 0; i < m; i++) {
        int64_t skipped = 0;
        starts[i] = (int32_t)nnz, gap_starts[i] = (int32_t)at;
        for (int64_t j = 0; j < n; j++) {
            if (uniform() >= density) {
                skipped++;
                continue;
            }
            set_bit(bits, n, i, j);
            for (; skipped >= 255; skipped -= 255) bytes[at++] = 255;
            bytes[at++] = (uint8_t)skipped, skipped = 0, nnz++;
        }
    }
    starts[m] = (int32_t)nnz, gap_starts[m] = (int32_t)at;
    index = exact(gaps ? at : m * stride);
    memcpy(index, gaps ? bytes : bits, gaps ? at : m * stride);
    bad |= losparse_starts_of_bits(bits, m, n, nnz, found) || memcmp(found, starts, (m + 1) * 4);

    void *values = exact(nnz * size), *U = exact(m * rank * size), *V = exact(rank * n * size), *bias = exact(m * size);
    void *x = exact(rows * n * size), *y = exact(rows * m * size), *S = exact(m * n * size);
    fill(values, nnz, dtype), fill(U, m * rank, dtype), fill(V, rank * n, dtype), fill(bias, m, dtype);
    fill(x, rows * n, dtype);
    Layer layer = {values, index, starts, gaps ? gap_starts : NULL, rank ? U : NULL, rank ? V : NULL, bias,
                   m, n, rank, dtype};

    if (losparse_expand(&layer, S, 0, m, size, 2, level)) bad = 1;
    double *sparse = exact(rows * m * sizeof *sparse), *whole = exact(rows * m * sizeof *whole);
    double *inner = inner_products(V, x, rank, rows, n, dtype);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < m; i++) {
            double sum = 0, low = get(bias, i, dtype);
            int64_t k = starts[i];
            for (int64_t j = 0; j < n; j++) {
                const int there = bits[i * stride + j / 8] >> (j % 8) & 1;
                const float s = there ? get(values, k++, dtype) : 0.0f;
                if (get(S, i * n + j, dtype) != s) bad = 2;
                sum += (double)s * get(x, t * n + j, dtype);
            }
            for (int64_t r = 0; r < rank; r++) low += inner[t * rank + r] * get(U, i * rank + r, dtype);
            sparse[t * m + i] = sum, whole[t * m + i] = sum + low;
        }
    const int answer = losparse_few(&layer, x, y, rows, 2, level);
    const int can = rows <= (level >= LEVEL_AVX512 && !gaps ? 16 : 1);
    if (answer != (can ? 0 : 2) || (can && differs(y, whole, rows * m, dtype))) bad = 3;
    memset(y, 0, rows * m * size);
    if (losparse_walk(&layer, x, y, rows, 2, level) || differs(y, sparse, rows * m, dtype)) bad = 4;

    void *all[] = {bits, bytes, starts, gap_starts, found, index, values, U, V, bias, x, y, S, sparse, whole, inner};
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]);
    if (bad)
        printf("%s: m %ld n %ld rank %ld density %g rows %ld dtype %d gaps %d level %d\n",
               (const char *[]){"", "index", "expand", "few", "walk"}[bad], (long)m, (long)n, (long)rank, density,
               (long)rows, dtype, gaps, level);
    return bad;
}

/* Kept rows or columns, in one pass and added to a product. */
static int block(int64_t m, int64_t n, int64_t rank, int64_t count, int64_t rows, int dtype, int by_row, int level) {
    const int size = dtype == BFLOAT16 ? 2 : 4;
    const int64_t all = by_row ? m : n, width = by_row ? n : count;
    int32_t *kept = exact(count * 4);
    for (int64_t k = 0; k < count; k++) kept[k] = (int32_t)(k * all / count);
    const int64_t nnz = count * (by_row ? n : m);
    void *values = exact(nnz * size), *U = exact(m * rank * size), *V = exact(rank * n * size), *bias = exact(m * size);
    void *x = exact(rows * n * size), *y = exact(rows * m * size), *part = exact(rows * count * size);
    fill(values, nnz, dtype), fill(U, m * rank, dtype), fill(V, rank * n, dtype), fill(bias, m, dtype);
    fill(x, rows * n, dtype), fill(part, rows * count, dtype);
    Layer layer = {values, NULL, NULL, NULL, rank ? U : NULL, rank ? V : NULL, bias, m, n, rank, dtype, kept, count};
    double *whole = exact(rows * m * sizeof *whole), *inner = inner_products(V, x, rank, rows, n, dtype);
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t i = 0; i < m; i++) {
            whole[t * m + i] = get(bias, i, dtype);
            for (int64_t r = 0; r < rank; r++) whole[t * m + i] += inner[t * rank + r] * get(U, i * rank + r, dtype);
        }
        for (int64_t i = 0; i < (by_row ? count : m); i++)
            for (int64_t j = 0; j < width; j++)
                whole[t * m + (by_row ? kept[i] : i)] +=
                    (double)get(values, i * width + j, dtype) * get(x, t * n + (by_row ? j : kept[j]), dtype);
    }
    const int answer = losparse_block(&layer, by_row, x, y, rows, 2, level), can = rows <= 16 && level >= LEVEL_AVX512;
    int bad = answer != (can ? 0 : 2) || (can && differs(y, whole, rows * m, dtype));
    if (by_row) losparse_add_columns(y, part, kept, rows, m, count, dtype, 2);
    void *every[] = {kept, values, U, V, bias, x, y, part, whole, inner};
    for (size_t k = 0; k < sizeof every / sizeof *every; k++) free(every[k]);
    if (bad) printf("block: m %ld n %ld count %ld rows %ld dtype %d by_row %d level %d\n", (long)m, (long)n, (long)count,
                    (long)rows, dtype, by_row, level);
    return bad;
}

/* Whatever lies in a damaged index: no access outside, whatever the answer. */
static void damaged(int64_t m, int64_t n, int64_t group_rows, int per_byte) {
    const int64_t groups = (m + group_rows - 1) / group_rows, bytes = (int64_t)(uniform() * 60), nnz = bytes * per_byte;
    uint8_t *stream = exact(bytes), *bits = exact(m * ((n + 7) / 8));
    int32_t *offsets = exact((groups + 1) * 8), *starts = exact((m + 1) * 4);
    for (int64_t b = 0; b < bytes; b++) stream[b] = (uint8_t)(uniform() * 256);
    for (int64_t g = 1; g <= groups; g++) {
        offsets[2 * g] = g == groups ? (int32_t)nnz : (int32_t)(nnz * g / groups);
        offsets[2 * g + 1] = g == groups ? (int32_t)bytes : (int32_t)(bytes * g / groups);
    }
    if (uniform() < 0.3) offsets[(int64_t)(uniform() * 2 * (groups + 1))] = (int32_t)(uniform() * 2e9 - 1e9);
    losparse_bits_of_gaps(stream, bytes, offsets, group_rows, m, n, nnz, per_byte, bits, starts, 2);
    memset(bits, 0, m * ((n + 7) / 8));
    const int keep = 2, group = 4, width = 2;
    uint8_t *packed = exact((m * (n / group) * keep * width + 7) / 8);
    for (int64_t b = 0; b < (m * (n / group) * keep * width + 7) / 8; b++) packed[b] = (uint8_t)(uniform() * 256);
    losparse_bits_of_groups(packed, keep, group, width, m, n / group * group, bits, starts, 2);
    for (int64_t b = 0; b < m * ((n + 7) / 8); b++) bits[b] = (uint8_t)(uniform() * 256);
    losparse_starts_of_bits(bits, m, n, nnz, starts);
    free(stream), free(bits), free(offsets), free(starts), free(packed);
}

/* Codes in few bits: into them, out again, and their product. */
static int codes(int64_t m, int64_t n, int64_t rank, int bits, int64_t rows, int dtype, int level) {
    const int size = dtype == BFLOAT16 ? 2 : 4, half = 1 << (bits - 1);
    const int64_t packed = (m + STRIP - 1) / STRIP * ((n + LINE - 1) / LINE) * LINE * bits;
    int16_t *q = exact(m * n * sizeof *q);
    int64_t rest = 0, counts[9];
    for (int64_t k = 0; k < m * n; k++) {
        q[k] = (int16_t)(uniform() * 2 * half - half);
        if (uniform() < 0.01) q[k] = (int16_t)(uniform() * 60000 - 30000);
        rest += q[k] < -half || q[k] >= half;
    }
    uint8_t *index = exact(packed + (rest ? 4 * (m + 1) + 8 * rest : 0)), *exponents = exact(n);
    int32_t *again = exact(m * n * sizeof *again);
    float *S = exact(m * n * sizeof *S);
    for (int64_t j = 0; j < n; j++) exponents[j] = (uint8_t)(110 + uniform() * 36);
    void *values = exact(m * size), *U = exact(m * rank * size), *V = exact(rank * n * size), *bias = exact(m * size);
    void *x = exact(rows * n * size), *y = exact(rows * m * size), *half_of_S = exact(m * n * 2);
    fill(values, m, dtype), fill(U, m * rank, dtype), fill(V, rank * n, dtype), fill(bias, m, dtype);
    fill(x, rows * n, dtype);
    Layer layer = {values, index, (const int32_t *)exponents, NULL, rank ? U : NULL, rank ? V : NULL, bias,
                   m, n, rank, dtype, NULL, 0, bits, rest};
    int bad = losparse_code_bits(q, m * n, 2, counts, 2);
    for (int b = bits + 1; b <= 8; b++) counts[0] += counts[b];
    bad |= counts[0] != rest;
    bad |= losparse_pack_codes(&layer, q, 2, 2, level);
    bad |= losparse_rows_of_codes(&layer, NULL, 0, m, WHOLE, 1, again, 2, level);
    bad |= losparse_rows_of_codes(&layer, NULL, 0, m, FLOAT32, 1, S, 2, level);
    bad |= losparse_rows_of_codes(&layer, (const int64_t[]){m - 1}, 0, 1, BFLOAT16, 1, half_of_S, 2, level);
    float *factors = exact((n + 7) / 8 * 8 * sizeof *factors), *scaled = exact(rows * n * sizeof *scaled);
    column_factors(exponents, n, factors);
    bad |= losparse_scale(&layer, x, rows, FLOAT32, scaled, 2, level);
    for (int64_t e = 0; e < rows * n; e++) bad |= scaled[e] != get(x, e, dtype) * factors[e % n];
    uint16_t *alone = exact(m * n * 2);
    bad |= losparse_rows_of_codes(&layer, NULL, 0, m, BFLOAT16, 0, alone, 2, level);
    for (int64_t e = 0; e < m * n; e++) bad |= alone[e] != narrow((float)q[e]);
    free(alone), free(scaled);
    double *whole = exact(rows * m * sizeof *whole), *inner = inner_products(V, x, rank, rows, n, dtype);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < m; i++) {
            double sum = get(bias, i, dtype);
            for (int64_t j = 0; j < n; j++) {
                const float s = (float)q[i * n + j] * factors[j] * get(values, i, dtype);
                bad |= again[i * n + j] != q[i * n + j] || S[i * n + j] != s;
                sum += (double)s * get(x, t * n + j, dtype);
            }
            for (int64_t r = 0; r < rank; r++) sum += inner[t * rank + r] * get(U, i * rank + r, dtype);
            whole[t * m + i] = sum;
        }
    bad |= losparse_coded(&layer, x, y, rows, dtype == BFLOAT16 ? 2 : 3, 2, level) || differs(y, whole, rows * m, dtype);
    put(x, n - 1, NAN, dtype);
    bad |= losparse_coded(&layer, x, y, rows, 2, 2, level) != 3;
    void *every[] = {q, index, exponents, again, S, values, U, V, bias, x, y, half_of_S, whole, inner};
    free(factors);
    for (size_t k = 0; k < sizeof every / sizeof *every; k++) free(every[k]);
    if (bad) printf("codes: m %ld n %ld rank %ld bits %d rows %ld dtype %d level %d\n", (long)m, (long)n, (long)rank, bits,
                    (long)rows, dtype, level);
    return bad;
}

/* Codes to words and back, from an odd address; then words that are others or too few. */
static int stream(int64_t m, int64_t n, int64_t lane_rows, int level) {
    static const int32_t frequencies[] = {100, 300, 700, 1500, 700, 300, 100, 20, 60, 400, 3000, 400, 60, 20,
                                          1, 1, 1, 4000, 1, 1, 1};
    static const int32_t widths[] = {3, 3, 3};
    uint8_t *rows = exact(m), *columns = exact(n);
    int32_t *values = exact(4 * m * n), *escapes = exact(4 * m * n);
    const int64_t lanes = (m + lane_rows - 1) / lane_rows, chunks = (lanes + LANES - 1) / LANES;
    uint32_t *counts = exact(4 * chunks), *states = exact(4 * lanes);
    uint16_t *words = exact(2 * m * n);
    int8_t *again = exact(m * n);
    for (int64_t i = 0; i < m; i++) rows[i] = uniform() < 0.5;
    for (int64_t j = 0; j < n; j++) columns[j] = uniform() < 0.5;
    for (int64_t k = 0; k < m * n; k++) values[k] = (int32_t)(uniform() < 0.02 ? uniform() * 200 - 100 : uniform() * 7 - 3.5);
    const Classes c = {m, n, lane_rows, rows, columns, frequencies, widths, 3, 2, level};
    const int64_t found = losparse_encode_codes(&c, values, counts, states, words, escapes);
    int64_t total = 0;
    for (int64_t k = 0; k < chunks; k++) total += counts[k];
    char *loose = exact(2 * total + 1), *at = loose + 1;
    memcpy(at, words, 2 * total);
    int bad = found < 0 || losparse_decode_codes(&c, counts, states, (uint16_t *)at, escapes, found, 1, again);
    for (int64_t k = 0; k < m * n; k++) bad |= again[k] != values[k];
    for (int k = 0; k < 30; k++) {
        if (total && k % 3) at[(int64_t)(uniform() * 2 * total)] ^= (char)(1 << k % 8);
        else states[(int64_t)(uniform() * lanes)] ^= 1u << k;
        losparse_decode_codes(&c, counts, states, (uint16_t *)at, escapes, found, 1, again);
    }
    if (total) {
        counts[chunks - 1]--;
        bad |= counts[chunks - 1] != UINT32_MAX && !losparse_decode_codes(&c, counts, states, (uint16_t *)at, escapes, found, 1, again);
    }
    void *every[] = {rows, columns, values, escapes, counts, states, words, again, loose};
    for (size_t k = 0; k < sizeof every / sizeof *every; k++) free(every[k]);
    if (bad) printf("stream: m %ld n %ld rows a lane %ld level %d\n", (long)m, (long)n, (long)lane_rows, level);
    return bad;
}

/* One block of a decoder over some positions, against the same at the plain level. */
static int decoder(int64_t width, int64_t heads, int64_t kept, int64_t inside, int64_t rows, int dtype, int level) {
    const int64_t hidden = 21, room = 5, size = dtype == BFLOAT16 ? 2 : 4;
    const int64_t shapes[][2] = {{heads * width, hidden}, {kept * width, hidden}, {kept * width, hidden},
                                 {hidden, heads * width}, {inside, hidden}, {inside, hidden}, {hidden, inside}};
    enum { STREAM = 0, NORMED = 32, MADE = 64 };
    const int64_t Q = 96, K = Q + heads * width, V = K + kept * width, A = V + kept * width, UP = A + heads * width,
                  G = UP + inside, end = G + inside;
    const int64_t widest = 3 * (heads * width + inside + hidden);
    float *memory[2], *turn = exact(8 * width), *weight = exact(4 * hidden), *scores = exact(4 * rows * heads * room);
    char *narrow = exact(2 * rows * widest * size), *keys = exact(rows * kept * room * width * size),
         *values = exact(rows * kept * room * width * size);
    void *matrices[7];
    Layer layers[7];
    for (int k = 0; k < 7; k++) {
        matrices[k] = exact(shapes[k][0] * shapes[k][1] * size);
        fill(matrices[k], shapes[k][0] * shapes[k][1], dtype);
        layers[k] = (Layer){.V = matrices[k], .m = shapes[k][0], .n = shapes[k][1], .rank = shapes[k][0], .dtype = dtype};
    }
    fill(turn, 2 * width, FLOAT32), fill(weight, hidden, FLOAT32);
    for (int pass = 0; pass < 2; pass++) memory[pass] = exact(4 * rows * end);
    int bad = 0;
    for (int kind = SILU; kind <= RELU; kind++) {
        const Operation list[] = {
            {.kind = NORM, .from = STREAM, .to = {NORMED}, .width = hidden, .count = 1, .weight = weight, .number = 1e-5f},
            {.kind = PRODUCT, .choice = DENSE, .from = NORMED, .to = {Q, K, V}, .count = 3, .layers = {layers, layers + 1, layers + 2}},
            {.kind = ROTATE, .from = Q, .to = {Q}, .width = width, .count = heads, .weight = turn},
            {.kind = ATTEND, .from = Q, .to = {A, K, V}, .width = width, .count = heads, .kept = kept, .keys = keys,
             .values = values, .room = room, .window = kind == SILU ? 0 : 2, .number = 0.3f},
            {.kind = PRODUCT, .choice = DENSE, .from = A, .to = {MADE}, .count = 1, .layers = {layers + 3}},
            {.kind = ADD, .from = MADE, .to = {STREAM}, .width = hidden},
            {.kind = PRODUCT, .choice = DENSE, .from = STREAM, .to = {G, UP}, .count = 2, .layers = {layers + 4, layers + 5}},
            {.kind = GATE, .choice = kind, .from = G, .to = {UP}, .width = inside},
            {.kind = PRODUCT, .choice = DENSE, .from = UP, .to = {MADE}, .count = 1, .layers = {layers + 6}},
        };
        fill(memory[0], rows * end, FLOAT32);
        memcpy(memory[1], memory[0], 4 * rows * end);
        for (int pass = 0; pass < 2; pass++)
            for (int64_t position = 0; position < room; position++) {
                const Step s = {memory[pass], scores, narrow, rows, position, widest, dtype, 2, pass ? PLAIN : level};
                bad |= losparse_step(list, sizeof list / sizeof *list, &s);
            }
        const float most = dtype == BFLOAT16 ? 0.1f : 1e-3f;
        for (int64_t k = 0; k < rows * hidden; k++)
            bad |= !(fabsf(memory[0][k] - memory[1][k]) <= most * (1 + fabsf(memory[1][k])));
    }
    void *every[] = {memory[0], memory[1], turn, weight, scores, narrow, keys, values};
    for (size_t k = 0; k < sizeof every / sizeof *every; k++) free(every[k]);
    for (int k = 0; k < 7; k++) free(matrices[k]);
    if (bad) printf("decoder: width %ld heads %ld kept %ld inside %ld rows %ld dtype %d level %d\n", (long)width, (long)heads,
                    (long)kept, (long)inside, (long)rows, dtype, level);
    return bad;
}

int main(void) {
    const int64_t sizes[][2] = {{1, 1}, {7, 13}, {13, 7}, {33, 64}, {130, 127}, {17, 576}, {40, 1537}};
    const double densities[] = {0, 0.004, 0.1, 0.5, 1};
    const int64_t counts[] = {1, 2, 3, 5, 8, 9, 13, 16, 17, 40, 70};
    int checked = 0;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (size_t d = 0; d < sizeof densities / sizeof *densities; d++)
            for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
                for (int level = losparse_level(); level >= 0; level--, checked++)
                    if (one(sizes[s][0], sizes[s][1], (int64_t[]){0, 3, 8, 17}[checked % 4], densities[d], counts[c],
                            checked / 4 % 2, checked / 8 % 2, level))
                        return 1;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
            for (int way = 0; way < 4; way++, checked++) {
                const int64_t all = sizes[s][way % 2 ? 0 : 1];
                const int64_t count = all < 3 ? 1 : (int64_t[]){1, all / 2, all}[c % 3];
                if (block(sizes[s][0], sizes[s][1], (int64_t[]){0, 3, 8, 17}[c % 4], count, counts[c], way / 2, way % 2,
                          losparse_level() - (int)(c % 2)))
                    return 1;
            }
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int bits = 2; bits <= 8; bits++)
            for (int level = losparse_level(); level >= 0; level--, checked++)
                if (codes(sizes[s][0], sizes[s][1], (int64_t[]){0, 3, 17}[checked % 3], bits, (int64_t[]){1, 2, 5, 17, 40}[checked % 5],
                          checked % 2, level))
                    return 1;
    for (int k = 0; k < 2000; k++, checked++) damaged(1 + k % 9, 1 + k % 37, 1 + k % 4, 1 + k % 2);
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int64_t lane_rows = 1; lane_rows <= 3; lane_rows++)
            for (int level = losparse_level() < LEVEL_AVX2 ? PLAIN : LEVEL_AVX2; level >= 0; level--, checked++)
                if (stream(sizes[s][0], sizes[s][1], lane_rows, level)) return 1;
    for (int k = 0; k < 24; k++)
        for (int level = losparse_level(); level >= 0; level--, checked++)
            if (decoder((int64_t[]){2, 10, 64, 70}[k % 4], 4, k % 3 ? 2 : 4, (int64_t[]){1, 8, 37}[k % 3], 1 + k % 2, k / 2 % 2, level))
                return 1;
    printf("checked %d\n", checked);
    return 0;
}
