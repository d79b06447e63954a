/* Few rows of x: everything in one pass, by spread or, for one row, by gather. */

#define FEW(NAME, TARGET, LEVEL, DOT)                                                                                 \
    TARGET static void NAME##_project(const Layer *layer, const void *x, float *t, int rows, int64_t r) {             \
        for (int k = 0; k < rows; k++)                                                                                \
            t[k * padded_rank(layer) + r] = layer->dtype == BFLOAT16                                                  \
                                         ? DOT(layer->V, r * layer->n, x, k * layer->n, layer->n, BFLOAT16)           \
                                         : DOT(layer->V, r * layer->n, x, k * layer->n, layer->n, FLOAT32);           \
    }                                                                                                                 \
    TARGET static void NAME##_gather(const Layer *layer, const float *x, const float *t, void *y, int64_t i0,         \
                                     int64_t i1, uint16_t *columns) {                                                 \
        for (int64_t i = i0; i < i1; i++) {                                                                           \
            const int64_t start = layer->starts[i], count = columns_of_row(layer, i, columns, LEVEL);                 \
            if (layer->dtype == BFLOAT16) {                                                                           \
                const void *v = (const uint16_t *)layer->values + start;                                              \
                put(y, i, gather_row(v, columns, count, x, LEVEL, BFLOAT16) + low_rank(layer, i, t, BFLOAT16),        \
                    BFLOAT16);                                                                                        \
            } else {                                                                                                  \
                const void *v = (const float *)layer->values + start;                                                 \
                put(y, i, gather_row(v, columns, count, x, LEVEL, FLOAT32) + low_rank(layer, i, t, FLOAT32), FLOAT32);\
            }                                                                                                         \
        }                                                                                                             \
    }

FEW(few_plain, , PLAIN, dot8)
#if defined(__x86_64__)
FEW(few_avx2, AVX2, LEVEL_AVX2, dot8)
FEW(few_avx512, AVX512, LEVEL_AVX512, dot)
#endif

/* Entry r of V x for each row of x, into t (rows, rank padded to a multiple of 16). */
static void project(const Layer *layer, const void *x, float *t, int64_t rows, int64_t r, int level) {
#if defined(__x86_64__)
    if (level >= LEVEL_AVX512_BF16 && layer->dtype == BFLOAT16) {
        const int64_t n = layer->n, padded = padded_rank(layer);
        for (int64_t k = 0; k < rows; k++)
            t[k * padded + r] = dot_pairs((const uint16_t *)layer->V + r * n, (const uint16_t *)x + k * n, n);
    } else if (level >= LEVEL_AVX512) {
        few_avx512_project(layer, x, t, (int)rows, r);
    } else if (level >= LEVEL_AVX2) {
        few_avx2_project(layer, x, t, (int)rows, r);
    } else
#endif
        few_plain_project(layer, x, t, (int)rows, r);
    (void)level;
}

/* y (rows, m) = x (rows, n) (U V + S)ᵀ + bias, whole, for 1 to 16 rows; one row only without AVX-512 or with gaps.
   Returns 0; 1 if there was no memory; 2 if it cannot. */
int losparse_few(const Layer *layer, const void *x, void *y, int64_t rows, int threads, int level) {
    const int64_t m = layer->m, n = layer->n, rank = layer->rank;
    const int spread = level >= LEVEL_AVX512 && !layer->gap_starts;
    if (rows < 1 || rows > (spread ? 16 : 1)) return 2;
    const int64_t R = spread_rows(rows);
    const int size = layer->dtype == BFLOAT16 ? 2 : 4;
    const int64_t padded = (n + 127) / 128 * 128;
    float *t = calloc(R * padded_rank(layer) + 1, sizeof *t);
    void *ready = aligned_alloc(64, (size_t)(padded * (spread ? R * size : 4)));
    int failed = t == NULL || ready == NULL;
    if (!failed) {
        if (!spread)
            for (int64_t j = 0; j < n; j++) ((float *)ready)[j] = get(x, j, layer->dtype);
#pragma omp parallel num_threads(threads) reduction(| : failed)
        {
            uint16_t *columns = spread ? NULL : malloc((n + 32) * sizeof *columns);
            failed |= !spread && columns == NULL;
#if defined(__x86_64__)
            if (spread) {
#pragma omp for schedule(static) nowait
                for (int64_t j = 0; j < padded; j += 128) pack(x, n, rows, R, size, j, j + 128, ready);
            }
#endif
            if (rank) {
#pragma omp for schedule(static) nowait
                for (int64_t r = 0; r < rank; r++) project(layer, x, t, rows, r, level);
            }
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < m; i += CHUNK) {
                const int64_t end = i + CHUNK < m ? i + CHUNK : m;
                if (!spread && columns == NULL) continue;
#if defined(__x86_64__)
                if (spread && layer->dtype == FLOAT32) spread_rows_f32(layer, ready, t, y, (int)rows, i, end);
                else if (spread && level >= LEVEL_AVX512_BF16) spread_rows_bf16(layer, ready, t, y, (int)rows, i, end);
                else if (spread) spread_rows_bf16_widened(layer, ready, t, y, (int)rows, i, end);
                else if (level >= LEVEL_AVX512) few_avx512_gather(layer, ready, t, y, i, end, columns);
                else if (level >= LEVEL_AVX2) few_avx2_gather(layer, ready, t, y, i, end, columns);
                else
#endif
                    few_plain_gather(layer, ready, t, y, i, end, columns);
            }
            free(columns);
        }
    }
    free(t);
    free(ready);
    return failed;
}
