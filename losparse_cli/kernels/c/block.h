/* block: kept rows or columns, a dense matrix, for few rows of x (AVX-512). */

#if defined(__x86_64__)
#define SINGLES(acc, a, b) _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc)

/* tile (R, GROUP), T rows from t0 on, at `count` (1 to 3) of the block's rows from i on; x packed for R rows. The
   block's next rows, which follow in memory, are asked for meanwhile. */
#define BLOCK(NAME, TARGET, TYPE, LANES, PARTLY, MASK, MULTIPLY, DTYPE)                                               \
    TARGET INLINE void NAME##_some(const Layer *layer, int by_row, const TYPE *x, int64_t R, const float *t,          \
                                   float *tile, int64_t i, int count, int64_t t0, int T) {                            \
        const int64_t q = by_row ? layer->n : layer->kept_count, padded = padded_rank(layer);                         \
        const TYPE *v = (const TYPE *)layer->values + i * q;                                                          \
        const __m512i high = _mm512_set1_epi32((int)0xffff0000);                                                      \
        __m512 acc[3][8];                                                                                             \
        int64_t j = 0, out[3];                                                                                        \
        (void)high;                                                                                                   \
        UNROLL for (int p = 0; p < count; p++) {                                                                      \
            out[p] = by_row ? layer->kept[i + p] : i + p;                                                             \
            UNROLL for (int k = 0; k < T; k++) acc[p][k] = _mm512_setzero_ps();                                       \
            if (layer->rank)                                                                                          \
                start((const TYPE *)layer->U + out[p] * layer->rank, t + t0 * padded, layer->rank, padded, T, 1,      \
                      DTYPE, acc[p]);                                                                                 \
        }                                                                                                             \
        for (; j + LANES <= q; j += LANES) {                                                                          \
            __m512i a[3];                                                                                             \
            UNROLL for (int p = 0; p < count; p++) {                                                                  \
                _mm_prefetch((const char *)(v + count * (q + j) + LANES * p), _MM_HINT_T0);                           \
                a[p] = _mm512_loadu_si512(v + p * q + j);                                                             \
            }                                                                                                         \
            UNROLL for (int k = 0; k < T; k++) {                                                                      \
                const __m512i from = _mm512_loadu_si512(x + j * R + LANES * (t0 + k));                                \
                UNROLL for (int p = 0; p < count; p++) acc[p][k] = MULTIPLY(acc[p][k], a[p], from);                   \
            }                                                                                                         \
        }                                                                                                             \
        if (j < q) {                                                                                                  \
            const MASK some = (MASK)_bzhi_u32(~0u, (uint32_t)(q - j));                                                \
            __m512i a[3];                                                                                             \
            UNROLL for (int p = 0; p < count; p++) a[p] = PARTLY(some, v + p * q + j);                                \
            UNROLL for (int k = 0; k < T; k++) {                                                                      \
                const __m512i from = _mm512_loadu_si512(x + j * R + LANES * (t0 + k));                                \
                UNROLL for (int p = 0; p < count; p++) acc[p][k] = MULTIPLY(acc[p][k], a[p], from);                   \
            }                                                                                                         \
        }                                                                                                             \
        UNROLL for (int p = 0; p < count; p++) {                                                                      \
            float sums[8] = {0};                                                                                      \
            add_lanes(acc[p], T, 1, sums);                                                                            \
            const float bias = layer->bias ? get(layer->bias, out[p], DTYPE) : 0.0f;                                  \
            for (int k = 0; k < T; k++) tile[(t0 + k) * GROUP + p] = sums[k] + bias;                                  \
        }                                                                                                             \
    }                                                                                                                 \
    TARGET static void NAME(const Layer *layer, int by_row, const TYPE *x, int64_t R, const float *t, void *y,        \
                            int64_t i0, int64_t i1) {                                                                 \
        for (int64_t g = i0; g < i1; g += GROUP) {                                                                    \
            const int64_t end = g + GROUP < i1 ? g + GROUP : i1;                                                      \
            float tile[16 * GROUP];                                                                                   \
            for (int64_t i = g, count; i < end; i += count) {                                                         \
                float *to = tile + i - g;                                                                             \
                count = i + 3 <= end ? 3 : i + 2 <= end ? 2 : 1;                                                      \
                for (int64_t t0 = 0, T; t0 < R; t0 += T) {                                                            \
                    T = R - t0 >= 8 ? 8 : R - t0 >= 4 && count == 3 ? 4 : R - t0 >= 2 && count == 3 ? 2 : 1;          \
                    if (T == 8 && count == 3) NAME##_some(layer, by_row, x, R, t, to, i, 3, t0, 8);                   \
                    else if (T == 8 && count == 2) NAME##_some(layer, by_row, x, R, t, to, i, 2, t0, 8);              \
                    else if (T == 8) NAME##_some(layer, by_row, x, R, t, to, i, 1, t0, 8);                            \
                    else if (T == 4) NAME##_some(layer, by_row, x, R, t, to, i, 3, t0, 4);                            \
                    else if (T == 2) NAME##_some(layer, by_row, x, R, t, to, i, 3, t0, 2);                            \
                    else if (count == 3) NAME##_some(layer, by_row, x, R, t, to, i, 3, t0, 1);                        \
                    else if (count == 2) NAME##_some(layer, by_row, x, R, t, to, i, 2, t0, 1);                        \
                    else NAME##_some(layer, by_row, x, R, t, to, i, 1, t0, 1);                                        \
                }                                                                                                     \
            }                                                                                                         \
            for (int64_t k = 0; k < R; k++) {                                                                         \
                if (!by_row) put_line(y, k * layer->m + g, tile + k * GROUP, end - g, DTYPE);                         \
                for (int64_t i = g; i < end && by_row; i++)                                                           \
                    put(y, k * layer->m + layer->kept[i], tile[k * GROUP + i - g], DTYPE);                            \
            }                                                                                                         \
        }                                                                                                             \
    }

BLOCK(block_bf16, AVX512_BF16, uint16_t, 32, _mm512_maskz_loadu_epi16, __mmask32, PAIRS_NATIVE, BFLOAT16)
BLOCK(block_bf16_widened, AVX512, uint16_t, 32, _mm512_maskz_loadu_epi16, __mmask32, PAIRS_WIDENED, BFLOAT16)
BLOCK(block_f32, AVX512, float, 16, _mm512_maskz_loadu_epi32, __mmask16, SINGLES, FLOAT32)

/* Rows i0..i1 of y without S, 16 at a time. */
INLINE void rest_block(const Layer *layer, const float *t, void *y, int64_t i0, int64_t i1, int64_t rows, int dtype) {
    const int64_t rank = layer->rank, padded = padded_rank(layer);
    for (int64_t i = i0; i < i1; i += 16) {
        const int64_t count = i1 - i < 16 ? i1 - i : 16;
        vec acc[16];
        float lanes[16] = {0};
        for (int64_t l = 0; l < count && layer->bias; l++) lanes[l] = get(layer->bias, i + l, dtype);
        for (int64_t k = 0; k < rows; k++) memcpy(&acc[k], lanes, sizeof lanes);
        for (int64_t r = 0; r < rank; r++) {
            vec u;
            for (int64_t l = 0; l < count; l++) lanes[l] = get(layer->U, (i + l) * rank + r, dtype);
            memcpy(&u, lanes, sizeof u);
            for (int64_t k = 0; k < rows; k++) acc[k] += u * t[k * padded + r];
        }
        for (int64_t k = 0; k < rows; k++)
            put_line(y, k * layer->m + i, (const float *)&acc[k], count, dtype);
    }
}

AVX512 static void rest_rows(const Layer *layer, const float *t, void *y, int64_t i0, int64_t i1, int64_t rows) {
    if (layer->dtype == BFLOAT16) rest_block(layer, t, y, i0, i1, rows, BFLOAT16);
    else rest_block(layer, t, y, i0, i1, rows, FLOAT32);
}
#endif

/* y (rows, m) = x (rows, n) (U V + S)ᵀ + bias, whole, for 1 to 16 rows, with S the rows (by_row) or columns `kept`.
   Returns 0; 1 if there was no memory; 2 if it cannot, as without AVX-512. */
int losparse_block(const Layer *layer, int by_row, const void *x, void *y, int64_t rows, int threads, int level) {
#if defined(__x86_64__)
    const int64_t m = layer->m, n = layer->n, rank = layer->rank;
    if (rows < 1 || rows > 16 || level < LEVEL_AVX512) return 2;
    const int size = layer->dtype == BFLOAT16 ? 2 : 4;
    const int64_t width = by_row ? n : layer->kept_count, count = by_row ? layer->kept_count : m;
    const int64_t padded = (width + 127) / 128 * 128;
    float *t = calloc(rows * padded_rank(layer) + 1, sizeof *t);
    char *ready = aligned_alloc(64, (size_t)(padded * rows * size + 64));
    char *chosen = by_row ? NULL : malloc((size_t)(width * rows * size) + 1);
    const int failed = t == NULL || ready == NULL || (!by_row && chosen == NULL);
    if (!failed) {
#pragma omp parallel num_threads(threads)
        {
            if (!by_row) {
#pragma omp for schedule(static)
                for (int64_t j = 0; j < width; j++)
                    for (int64_t k = 0; k < rows; k++) {
                        const char *from = (const char *)x + (k * n + layer->kept[j]) * size;
                        memcpy(chosen + (k * width + j) * size, from, size);
                    }
            }
#pragma omp for schedule(static) nowait
            for (int64_t j = 0; j < padded; j += 128)
                pack(by_row ? x : chosen, width, rows, rows, size, j, j + 128, ready);
            if (rank) {
#pragma omp for schedule(static) nowait
                for (int64_t r = 0; r < rank; r++) project(layer, x, t, rows, r, level);
            }
#pragma omp barrier
            if (by_row) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < m; i += CHUNK) rest_rows(layer, t, y, i, i + CHUNK < m ? i + CHUNK : m, rows);
            }
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < count; i += CHUNK / 4) {
                const int64_t end = i + CHUNK / 4 < count ? i + CHUNK / 4 : count;
                if (layer->dtype == FLOAT32)
                    block_f32(layer, by_row, (const float *)ready, rows, t, y, i, end);
                else if (level >= LEVEL_AVX512_BF16)
                    block_bf16(layer, by_row, (const uint16_t *)ready, rows, t, y, i, end);
                else
                    block_bf16_widened(layer, by_row, (const uint16_t *)ready, rows, t, y, i, end);
            }
        }
    }
    free(t);
    free(ready);
    free(chosen);
    return failed;
#else
    (void)layer, (void)by_row, (void)x, (void)y, (void)rows, (void)threads, (void)level;
    return 2;
#endif
}

/* y (tokens, m), at the `count` columns of y that are kept, += part (tokens, count). */
void losparse_add_columns(void *y, const void *part, const int32_t *kept, int64_t tokens, int64_t m, int64_t count,
                          int dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < tokens; k++)
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = k * m + kept[i];
            put(y, at, get(y, at, dtype) + get(part, k * count + i, dtype), dtype);
        }
}
