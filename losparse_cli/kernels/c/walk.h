/* walk: one value after the other, `width` vectors of 16 rows of x at once. */

/* acc (width, 16) = sum over the row's entries of value * xt[column]; xt: (n, width, 16). */
INLINE void walk_row(const void *values, const uint16_t *columns, int64_t count, const float *xt, vec *acc, int width,
                     int dtype) {
    vec sum[8] = {{0}};
    const vec *x = (const vec *)xt;
    int64_t k = 0;
    for (; k + 2 <= count; k += 2) {
        const float a = get(values, k, dtype), b = get(values, k + 1, dtype);
        const vec *p = x + (int64_t)columns[k] * width, *q = x + (int64_t)columns[k + 1] * width;
        __builtin_prefetch((const char *)values + k * (dtype == BFLOAT16 ? 2 : 4) + AHEAD);
        UNROLL for (int w = 0; w < width; w++) sum[w] += a * p[w];
        UNROLL for (int w = 0; w < width; w++) sum[width + w] += b * q[w];
    }
    if (k < count) {
        const float a = get(values, k, dtype);
        const vec *p = x + (int64_t)columns[k] * width;
        UNROLL for (int w = 0; w < width; w++) sum[w] += a * p[w];
    }
    UNROLL for (int w = 0; w < width; w++) acc[w] = sum[w] + sum[width + w];
}

/* Rows i0..i1 of y (rows, m) += S xᵀ, for the `used` first of 16 * width rows. */
INLINE void walk_block(const Layer *layer, const float *xt, int width, int used, void *y, int64_t i0, int64_t i1,
                       uint16_t *columns, int level, int dtype) {
    const int size = dtype == BFLOAT16 ? 2 : 4;
    vec tile[GROUP][4];
    for (int64_t i = i0; i < i1; i += GROUP) {
        const int rows = i1 - i < GROUP ? (int)(i1 - i) : GROUP;
        for (int k = 0; k < rows; k++) {
            const int64_t start = layer->starts[i + k];
            const int64_t count = columns_of_row(layer, i + k, columns, level);
            walk_row((const char *)layer->values + start * size, columns, count, xt, tile[k], width, dtype);
        }
        for (int t = 0; t < used; t++) {
            float line[GROUP];
            const int64_t at = t * layer->m + i;
            for (int k = 0; k < rows; k++) line[k] = get(y, at + k, dtype) + ((const float *)tile[k])[t];
            put_line(y, at, line, rows, dtype);
        }
    }
}

/* xt (n, lanes) = x (used, n)ᵀ in float32, the missing rows zero. */
INLINE void transpose(const void *x, int64_t n, int used, int lanes, float *xt, int64_t j0, int64_t j1, int dtype) {
    for (int64_t j = j0; j < j1; j++)
        for (int t = 0; t < lanes; t++) xt[j * lanes + t] = t < used ? get(x, t * n + j, dtype) : 0.0f;
}

#define WALK(NAME, TARGET, LEVEL)                                                                                     \
    TARGET static void NAME(const Layer *layer, const float *xt, int width, int used, void *y, int64_t i0, int64_t i1,\
                            uint16_t *columns) {                                                                      \
        const int bf16 = layer->dtype == BFLOAT16;                                                                    \
        if (width == 1 && bf16) walk_block(layer, xt, 1, used, y, i0, i1, columns, LEVEL, BFLOAT16);                  \
        else if (width == 1) walk_block(layer, xt, 1, used, y, i0, i1, columns, LEVEL, FLOAT32);                      \
        else if (width == 2 && bf16) walk_block(layer, xt, 2, used, y, i0, i1, columns, LEVEL, BFLOAT16);             \
        else if (width == 2) walk_block(layer, xt, 2, used, y, i0, i1, columns, LEVEL, FLOAT32);                      \
        else if (bf16) walk_block(layer, xt, 4, used, y, i0, i1, columns, LEVEL, BFLOAT16);                           \
        else walk_block(layer, xt, 4, used, y, i0, i1, columns, LEVEL, FLOAT32);                                      \
    }                                                                                                                 \
    TARGET static void NAME##_transpose(const Layer *layer, const void *x, int used, int lanes, float *xt, int64_t j0,\
                                        int64_t j1) {                                                                 \
        if (layer->dtype == BFLOAT16) transpose(x, layer->n, used, lanes, xt, j0, j1, BFLOAT16);                      \
        else transpose(x, layer->n, used, lanes, xt, j0, j1, FLOAT32);                                                \
    }

WALK(walk_plain, , PLAIN)
#if defined(__x86_64__)
WALK(walk_avx2, AVX2, LEVEL_AVX2)
WALK(walk_avx512, AVX512, LEVEL_AVX512)
#endif

/* y (rows, m) += x (rows, n) Sᵀ. Returns 0, or 1 if there was no memory. */
int losparse_walk(const Layer *layer, const void *x, void *y, int64_t rows, int threads, int level) {
    const int64_t m = layer->m, n = layer->n;
    const int size = layer->dtype == BFLOAT16 ? 2 : 4;
    /* xᵀ is read at random: it should stay near. */
    const int fitting = n * 256 <= WALK_CACHE ? 4 : n * 128 <= WALK_CACHE ? 2 : 1;
    const int widest = rows > 32 && fitting > 2 ? 4 : rows > 16 && fitting > 1 ? 2 : 1;
    float *xt = aligned_alloc(64, (size_t)n * widest * 64);
    int failed = xt == NULL;
    for (int64_t t = 0; t < rows && !failed; t += 16 * widest) {
        const int used = rows - t < 16 * widest ? (int)(rows - t) : 16 * widest;
        const int width = used > 32 ? 4 : used > 16 ? 2 : 1, lanes = 16 * width; /* at most `widest` */
        const char *from = (const char *)x + t * n * size;
        char *to = (char *)y + t * m * size;
#pragma omp parallel num_threads(threads) reduction(| : failed)
        {
            uint16_t *columns = malloc((n + 32) * sizeof *columns);
            failed |= columns == NULL;
#pragma omp for schedule(static)
            for (int64_t j = 0; j < n; j += 256) {
                const int64_t end = j + 256 < n ? j + 256 : n;
#if defined(__x86_64__)
                if (level >= LEVEL_AVX512) walk_avx512_transpose(layer, from, used, lanes, xt, j, end);
                else if (level >= LEVEL_AVX2) walk_avx2_transpose(layer, from, used, lanes, xt, j, end);
                else
#endif
                    walk_plain_transpose(layer, from, used, lanes, xt, j, end);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < m; i += CHUNK) {
                const int64_t end = i + CHUNK < m ? i + CHUNK : m;
                if (columns == NULL) continue;
#if defined(__x86_64__)
                if (level >= LEVEL_AVX512) walk_avx512(layer, xt, width, used, to, i, end, columns);
                else if (level >= LEVEL_AVX2) walk_avx2(layer, xt, width, used, to, i, end, columns);
                else
#endif
                    walk_plain(layer, xt, width, used, to, i, end, columns);
            }
            free(columns);
        }
    }
    free(xt);
    return failed;
}
